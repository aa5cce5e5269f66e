"""Image processors and a small ViT for the tests."""

from transformers import ViTConfig, ViTForImageClassification


def image_processor(**options):
    """That of ViT which needs no torchvision; since Transformers 5.4 it has a name of its own."""
    try:
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    except ModuleNotFoundError:
        from transformers import ViTImageProcessor as ViTImageProcessorPil
    return ViTImageProcessorPil(**options)


def save_vit(folder, **options):
    """A ViT that looks at 16 x 16 pixels, with its processor."""
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        **options,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    image_processor(size={"height": 16, "width": 16}).save_pretrained(folder)

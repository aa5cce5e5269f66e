"""Image processors for the tests."""


def image_processor(**options):
    """That of ViT which needs no torchvision; since Transformers 5.4 it has a name of its own."""
    try:
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    except ModuleNotFoundError:
        from transformers import ViTImageProcessor as ViTImageProcessorPil
    return ViTImageProcessorPil(**options)

"""The failures of PEFT's own tests with our types, and why each is right."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping

from tests.methods.rows import INFO

ANCHORED = tuple(name for name, method in INFO.items() if method.anchored)
LORA = tuple(name for name in INFO if name != "svfit")
ALL = tuple(INFO)
JUDGE = "lora_ga"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Failures with one reason.

    Attributes:
        reason: why the failure is right.
        says: regular expression that the error and its traceback match.
        tests: regular expression of whole names `module::test`, without parameters. Default: any.
        types: the types that fail so.
    """

    reason: str
    says: str
    tests: str = ".*"
    types: tuple[str, ...] = ALL

    def explains(self, method: str, test: str, said: str) -> bool:
        """Whether a failure of a type has this reason."""
        return (
            method in self.types
            and re.fullmatch(self.tests, test.partition("[")[0]) is not None
            and re.search(self.says, said, re.DOTALL) is not None
        )


REFUSED = "refused by name: "
OTHERS = "PEFT compares the types and calls nothing of ours: "
INSIDE = "the test looks into a live adapter: "
START = "the test presumes LoRA's random start: "
SAVED = "the test presumes that a saved adapter has the type and form of the live one: "
STAND_IN = "the test needs what is not here: "

RULES = (
    # Refused by name -------------------------------------------------------------------------
    Rule(
        REFUSED + "an option that excludes the start",
        r"ConfigError: \w+Config cannot be used with \w+=",
        types=LORA,
    ),
    Rule(
        REFUSED + "a start of PEFT's own",
        r"ConfigError: \w+Config computes the initial weights itself; init_lora_weights must",
        types=LORA,
    ),
    Rule(
        REFUSED + "a start cannot be written to the meta device",
        r"ConfigError: low_cpu_mem_usage=True puts the adapter on the meta device",
        types=LORA,
    ),
    Rule(
        REFUSED + "combining live adapters that hold an anchor; saved ones can be",
        r"add_weighted_adapter cannot combine the live adapters",
        types=ANCHORED,
    ),
    Rule(
        REFUSED + "an option that SVFit lacks",
        r"TypeError: SVFitConfig.__init__\(\) got an unexpected keyword argument",
        types=("svfit",),
    ),
    Rule(
        REFUSED + "a target that SVFit does not adapt",
        r"TargetError: (SVFit adapts linear layers|PEFT would not load the saved adapter onto)"
        r"|ConfigError: SVFitConfig trains singular values of linear layers, not of parameters",
        types=("svfit",),
    ),
    Rule(
        REFUSED + "SVFit says it in another sentence than LoRA",
        r"Regex pattern did not match",
        r"test_(config|initialization|target_parameters|decoder_models|integrations)::.*",
        types=("svfit",),
    ),
    Rule(
        REFUSED + "a saved adapter is LoRA, which an SVFit config for inference cannot load",
        r"ConfigError: the saved form of this SVFit adapter is plain LoRA",
        types=("svfit",),
    ),
    Rule(
        REFUSED + "projections of experts; PEFT turns a LoRA config alone into one of parameters",
        r"NoMatchingPeftModuleError|config\.target_modules ==",
        r"test_integrations::test_qwen3_moe_(works|single_attention_regex_target_modules_works)",
        types=("svfit",),
    ),
    Rule(
        "the test is of options that these tests take out for SVFit, which lacks them",
        r"DID NOT WARN|did not match any of the \d+ warnings",
        r"test_initialization::test_(misconfigured_second_adapter|unmatched_alpha|partially_matched)"
        r".*|test_initialization::test_lora_config_raises_warning_with_eva_.*",
        types=("svfit",),
    ),
    Rule(
        REFUSED + "combining live SVFit adapters; saved ones can be",
        r"add_weighted_adapter cannot combine the live SVFit adapters",
        types=("svfit",),
    ),
    Rule(
        REFUSED + "live SVFit adapters by row of a batch; saved ones can be",
        r"SVFit cannot mix adapters in one batch",
        types=("svfit",),
    ),
    Rule(
        REFUSED + "parameters that PEFT keeps transposed, for types that need inputs",
        r"CalibrationError: the inputs of .* cannot be the start of its lora_A",
        types=("eva", "corda"),
    ),
    Rule(
        REFUSED + "a second get_peft_model, which with LoRA overwrites the first adapter",
        r"ConfigError: get_peft_model got a model that has",
        "test_mapping::test_get_peft_model_repeated_invocation",
    ),
    Rule(
        REFUSED + "saving what ZeRO-3 leaves of a factor, of which PEFT warns",
        r"DID NOT WARN",
        "test_low_level_api::test_save_pretrained_warns_for_unsharded_state_dict",
        types=tuple(name for name in LORA if name not in ANCHORED),
    ),
    Rule(
        OTHERS + "a saved adapter is LoRA, and is loaded beside a live one by load_for_training",
        r"Cannot combine adapters with different peft types",
    ),
    Rule(
        OTHERS + "hot-swapping into a live adapter",
        r"Incompatible PEFT types found: \w+ and LORA",
    ),
    Rule(
        OTHERS + "PeftMixedModel takes saved adapters",
        r"The provided `peft_type` '\w+' is not compatible with the `PeftMixedModel`",
    ),
    # What is not here; these fail with LoRA as well ---------------------------------------------
    Rule(STAND_IN + "a model of the Hub without a stand-in", r"OSError: We couldn't connect to"),
    Rule(STAND_IN + "an adapter of the Hub", r"ValueError: Can't find 'adapter_config.json' at"),
    Rule(STAND_IN + "diffusers", r"type object 'StableDiffusionPipeline' has no attribute"),
    Rule(
        STAND_IN + "a model of the Hub with other sizes and as many layers as there",
        r"scalings|expected|MIN_TARGET_MODULES|layers\.5|DID NOT WARN|768|must match|multiplied",
        r"test_initialization::test_scaling_\w+"
        r"|test_tuners_utils::test_get_peft_model_applies_find_target_modules"
        r"|test_low_level_api::test_inject_from_state_dict_(missing|extra)_keys_warning"
        r"|test_trainable_tokens::test_weight_tying_applied_when_model_is_tied"
        r"|test_decoder_models::test_weighted_combination_of_adapters",
    ),
    Rule(
        STAND_IN + "the vocabulary of a config on the Hub, to see that it has grown",
        r"assert contains_embedding",
        "test_trainable_tokens::test_save_pretrained_auto",
    ),
    Rule(
        "the test takes the first of the warnings, and there is one more",
        r"at your own risk",
        r"test_custom_models::test_(custom_lora_layer_issues_warning|target_layer_without_in_.*)",
    ),
    # Live adapters ---------------------------------------------------------------------------
    Rule(
        INSIDE + "an anchored one has `lora_A.default.parametrizations.weight.original`",
        r"KeyError: '[\w.]+\.(parametrizations\.weight\.original|lora_A\.default\.weight)'"
        r"|to require gradients, got .*parametrizations"
        r"|assert (sorted\(state_dict\) == expected|group_names\[lr\] ==)"
        r"|assert params_before\.keys\(\) == params_after\.keys\(\)"
        r"|assert (state_dict|sd_before)\.keys\(\) == (state_dict_loaded|sd_after)\.keys\(\)"
        r"|parametrizations.*== odict_keys|== odict_keys.*parametrizations",
        types=ANCHORED,
    ),
    Rule(
        INSIDE + "its class is not `LoraModel`",
        r"assert 'GradInitModel' == 'LoraModel'|assert 'SVFitModel' == 'LoraModel'",
    ),
    Rule(
        INSIDE
        + "an anchored one computes `lora_A.weight`, of rank 2r, from what is trained, so that "
        "what the test writes there, or its gradient, is lost",
        r"rank|weight\.shape|output_lora|out_lora|grad_B|PeftWarning|only change requires_grad flags of leaf",
        r"test_initialization::test_prepare_model_for_compiled_hotswap_\w+"
        r"|test_initialization::test_hotswap_works_different_ranks_conv2d_groups"
        r"|test_low_level_api::test_save_pretrained_warns_for_unsharded_state_dict"
        r"|test_target_parameters::test_rank_pattern_for_moe_target_parameters"
        r"|test_target_parameters::test_target_parameters_works_with_existing_parametrization"
        r"|test_target_parameters::test_targeting_module_and_targeting_param_equivalent"
        r"|test_lorafa::test_lorafa_respects_layer_specific_scaling_patterns"
        r"|test_custom_models::test_(multirank(_2)?|loading_adapter_preserves_custom_requires_grad)",
        types=ANCHORED,
    ),
    Rule(
        INSIDE + "a layer gets no more ranks than its weight has directions, with a warning",
        r"\.r\[.*\] ==|rank_expected|old_rank|DID NOT RAISE ValueError",
        r"test_\w+_models::test_weighted_combination_of_adapters"
        r"|test_tuners_utils::test_(no_)?rank_\w+"
        r"|test_initialization::test_prepare_model_for_compiled_hotswap_\w+"
        r"|test_custom_models::test_multirank(_2)?",
        types=ALL,
    ),
    Rule(
        INSIDE + "SVFit's layers are no `LoraLayer`, and have no `lora_A`, factors or scaling",
        r"'SVFit(Linear|Config)' object has no attribute"
        r"|KeyError: '[\w.]+\.(svfit_delta\.default|lora_A\.default\.weight)'"
        r"|scaling is only supported for models with `LoraLayer`s|assert scaling_factors"
        r"|No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap`"
        r"|svfit_\w+.*(require gradients|params_before|assert .*prefixes|sorted\(state_dict\))"
        r"|to require gradients, got .*svfit_|svfit_.*== odict_keys|== odict_keys.*svfit_|has no attribute '_get_kasa_loss'"
        r"|isinstance\(proj, LoraLayer\)|hasattr\(module, \"lora_A\"\)|startswith\(\"lora.Linear"
        r"|assert num_lora ==|\"o_proj\"\} <= adapted|DID NOT RAISE ValueError",
        types=("svfit",),
    ),
    Rule(
        INSIDE + "SVFit's basis does not train, and its ranks are counted when asked for",
        r"assert param\.grad is not None|dangling attributes after adapter deletion: \['r'",
        types=("svfit",),
    ),
    Rule(
        INSIDE + "SVFit's adapter is float32 and never on the meta device, as its docs say",
        r"== expected_dtype|<= expected_dtype|'?meta'?",
        types=("svfit",),
    ),
    Rule(
        INSIDE + "SVFit's card has other lines",
        r"assert len\(model_card\) > 1000",
        types=("svfit",),
    ),
    # The saved form --------------------------------------------------------------------------
    Rule(
        SAVED + "the names in the state dicts of the models are compared",
        r"assert state_dict\.keys\(\) == state_dict_from_pretrained\.keys\(\)",
    ),
    Rule(
        SAVED + "an anchored one has rank r, and its file rank 2r, also in layers that start plain",
        r"The size of tensor a \(\d+\) must match the size of tensor b",
        r"test_custom_models::test_(save_pretrained(_pickle)?|parameters_after_loading_model)",
        types=ANCHORED,
    ),
    Rule(
        SAVED + "the configs are compared",
        r"assert model_from_pretrained\.peft_config\[\"default\"\] is config"
        r"|assert reloaded_config\.rank_pattern ==",
    ),
    Rule(
        SAVED + "patterns of layers that got a lower rank differ",
        r"Configs are incompatible: for (alpha|rank)_pattern",
        "test_initialization::test_hotswap_works_different_ranks_alphas",
    ),
    # The start -------------------------------------------------------------------------------
    Rule(
        START + "B is zero, A is uniform",
        r"p_value > |lora_B weights not initialized to zero",
        r"test_initialization::test_lora_linear_init_default|test_lorafa::test_LoraFAOptimizer_step",
    ),
    Rule(
        START + "the output is that of the base, but LoRA-One begins with a step",
        r"torch\.allclose\((outputs_base, outputs_before|outputs_before, outputs_disabled)\b"
        r"|torch\.allclose\(output_base, output_(dora|lora)\)",
        r"test_(custom_models|trainable_tokens)::test_disable_adapters(_with_merging)?"
        r"|test_initialization::test_lora_use_dora_linear"
        r"|test_integrations::test_add_lora_to_mixtral_v5_works",
        types=("lora_one",),
    ),
    Rule(
        START + "bounds of the test are for random factors of LoRA's size",
        r"max_embedding_output|max_mse|min_corr|param_before, param_after",
        r"test_custom_models::test_only_params_are_updated"
        r"|test_decoder_models::test_lora_embed_scale_is_applied"
        r"|test_custom_models::test_add_weighted_adapter_with_different_scaling",
    ),
    Rule(
        START + "nothing runs the model at injection; the test counts passes",
        r"tensor_storage",
        "test_target_parameters::test_target_parameter_result_caching_works",
    ),
    Rule(
        START + "an injection says nothing; here it says which layers get a lower rank",
        r"assert not recwarn\.list",
        "test_low_level_api::test_inject_from_state_dict_and_from_config_target_same_layers",
    ),
)


def unexplained(method: str, failed: Mapping[str, str]) -> dict[str, str]:
    """The failures of a type that no rule explains."""
    return {test: said for test, said in failed.items() if not _rules(method, test, said)}


def stale(runs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Reasons that no failure has, from the failures of whole runs by type.

    A reason is judged by the runs of all of its types, or of `JUDGE`, which has all that it can have.
    """
    had = {
        rule
        for method, failed in runs.items()
        for test, said in failed.items()
        for rule in _rules(method, test, said)
    }
    judged = [r for r in RULES if set(r.types) <= set(runs) or JUDGE in {*r.types} & set(runs)]
    return [rule.reason for rule in judged if rule not in had]


def counts(method: str, failed: Mapping[str, str]) -> Counter[str]:
    """The number of failures by the first reason that explains them."""
    found = [_rules(method, test, said) for test, said in failed.items()]
    return Counter(rules[0].reason for rules in found if rules)


def _rules(method: str, test: str, said: str) -> list[Rule]:
    return [rule for rule in RULES if rule.explains(method, test, said)]

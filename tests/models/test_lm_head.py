"""The head of a transformers model, and what it reads, give the model's own logits."""

from __future__ import annotations

from typing import Any

import formulas
import peft
import pytest
import torch
import transformers

from fastpref.models.lm_head import check_head, lm_head_of, run_to_head

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**SIZES, **TOKENS, "intermediate_size": 16, "num_key_value_heads": 1}
GPT = {**TOKENS, "vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
MPT = {**TOKENS, "vocab_size": 40, "d_model": 16, "n_layers": 1, "n_heads": 2}
STATE_SPACE = {**SIZES, **TOKENS, "state_size": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURE = {**LLAMA, **EXPERTS, "num_local_experts": 4, "head_dim": 8}
LATENT_HEADS = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LATENT = {**LLAMA, **LATENT_HEADS, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
ROUTED = {**LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
HYBRID = {**LLAMA, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
GEMMA = {**LLAMA, "head_dim": 8, "final_logit_softcapping": 5.0}
GEMMA_4 = {
    **GEMMA,
    "layer_types": ["full_attention"],
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 40,
    "num_kv_shared_layers": 0,
}
GEMMA_3N = {**GEMMA_4, "laurel_rank": 4, "activation_sparsity_pattern": [0.0]}
COHERE = {**LLAMA, "logit_scale": 0.25}
COMPASS = {
    **COHERE,
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1.0}},
}
GRANITE = {**LLAMA, "logits_scaling": 4.0}
SPARSE_GRANITE = {**MIXTURE, "logits_scaling": 4.0}
FAMILIES: dict[str, dict[str, Any]] = {
    # Softcaps
    "Gemma2": GEMMA,
    "Gemma3Text": GEMMA,
    "Gemma3nText": GEMMA_3N,
    "Gemma4Text": GEMMA_4,
    "VaultGemma": GEMMA,
    "NanoChat": GEMMA,
    "Beam": GEMMA,
    "RecurrentGemma": {
        **LLAMA,
        "lru_width": 16,
        "attention_window_size": 8,
        "block_types": ["attention"],
        "logits_soft_cap": 5.0,
    },
    "xLSTM": {
        **TOKENS,
        "vocab_size": 40,
        "hidden_size": 64,  # its configuration rounds up to 64
        "num_hidden_layers": 1,
        "num_heads": 2,
        "qk_dim_factor": 1.0,
        "chunk_size": 2,
        "output_logit_soft_cap": 5.0,
    },
    # Scales
    "Cohere": COHERE,
    "Cohere2": COHERE,
    "Cohere2Moe": {**MIXTURE, "logit_scale": 0.25},
    "CohereCompassText": COMPASS,
    "Granite": GRANITE,
    "GraniteMoe": SPARSE_GRANITE,
    "GraniteMoeShared": SPARSE_GRANITE,
    "GraniteMoeHybrid": {**SPARSE_GRANITE, **HYBRID, "layer_types": ["full_attention"]},
    "HyperCLOVAX": GRANITE,
    "FalconH1": {**HYBRID, "mamba_d_ssm": 32, "lm_head_multiplier": 0.25},
    # Scales that the head does not see, or that the model does not use
    "MiniCPM3": {**LATENT, "dim_model_base": 4},
    "InklingText": {
        **ROUTED,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 8,
        "d_rel": 4,
        "rel_extent": 8,
        "logits_mup_width_multiplier": 3.0,
    },
    "Mpt": {**MPT, "logit_scale": "inv_sqrt_d_model"},
    # Biases
    "Phi": {**LLAMA, "partial_rotary_factor": 0.5},
    "Phimoe": {**MIXTURE, "lm_head_bias": True},
    "GPTJ": {**GPT, "rotary_dim": 4},
    "CodeGen": {**GPT, "n_head": 4, "rotary_dim": 4},
    "Bert": {**SIZES, **TOKENS, "intermediate_size": 16, "is_decoder": True},
    # None of these
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "Mixtral": MIXTURE,
    "Qwen2": LLAMA,
    "Qwen3": {**LLAMA, "head_dim": 8},
    "Qwen3Moe": MIXTURE,
    "Gemma": {**LLAMA, "head_dim": 8},
    "Phi3": LLAMA,
    "Glm4": {**LLAMA, "head_dim": 8},
    "Olmo2": LLAMA,
    "SmolLM3": LLAMA,
    "StableLm": LLAMA,
    "Starcoder2": LLAMA,
    "Nemotron": LLAMA,
    "Exaone4": LLAMA,
    "Ernie4_5": LLAMA,
    "Apertus": LLAMA,
    "DeepseekV3": {**ROUTED, "moe_intermediate_size": 16, "first_k_dense_replace": 0},
    "GptOss": MIXTURE,
    "GPT2": GPT,
    "GPTNeoX": {**SIZES, **TOKENS, "intermediate_size": 16},
    "OPT": {**SIZES, **TOKENS, "ffn_dim": 16, "word_embed_proj_dim": 16},
    "Bloom": {**TOKENS, "vocab_size": 40, "hidden_size": 16, "n_layer": 1, "n_head": 2},
    "Falcon": {**SIZES, **TOKENS},
    "BioGpt": {**SIZES, **TOKENS, "intermediate_size": 16},
    "Mamba": STATE_SPACE,
    "Jamba": {**LLAMA, "num_experts": 2, "attn_layer_offset": 0, "attn_layer_period": 1},
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
CLIP = {**VISION, "model_type": "clip_vision_model"}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
WRAPPERS: dict[str, dict[str, Any]] = {
    "Llava": {"text_config": {**LLAMA, "model_type": "llama"}, "vision_config": CLIP},
    "Qwen2VL": {
        "text_config": {**LLAMA, "rope_parameters": {"mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
    },
    # The head is of a causal language model inside it.
    "Llama4": {
        "text_config": {**MIXTURE, "intermediate_size_mlp": 16},
        "vision_config": {
            **VISION,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    },
    # These scale or cap as their text models do.
    "PaliGemma": {"text_config": {**GEMMA, "model_type": "gemma2"}, "vision_config": SIGLIP},
    "Gemma4": {"text_config": GEMMA_4},
    "MistralLarge4": {
        "text_config": {**ROUTED, "moe_intermediate_size": 16, "final_logit_softcapping": 5.0},
        "vision_config": {**VISION, "head_dim": 8, "model_type": "pixtral"},
    },
    "MuseGlimmer": {
        "text_config": {**GEMMA, "output_multiplier": 0.3},
        "vision_config": {**VISION, "layer_types": ["full_attention"]},
        "projector_hidden_size": 16,
    },
    "GraniteDocling": {
        "text_config": GRANITE,
        "vision_config": {**VISION, "out_hidden_size": 16, "deepstack_visual_indexes": [0]},
    },
    "HyperCLOVAXVisionV2": {
        "text_config": {**GRANITE, "model_type": "hyperclovax"},
        "vision_config": {**QWEN_VISION, "out_hidden_size": 16, "model_type": "qwen2_5_vl_vision"},
    },
    # These do not.
    "Gemma3": {"text_config": GEMMA, "vision_config": VISION, "mm_tokens_per_image": 4},
    "AyaVision": {"text_config": {**COHERE, "model_type": "cohere2"}, "vision_config": SIGLIP},
    "Cohere2Vision": {
        "text_config": {**COHERE, "model_type": "cohere2"},
        "vision_config": SIGLIP,
        "alignment_intermediate_size": 16,
    },
    "LlavaNext": {"text_config": {**GRANITE, "model_type": "granite"}, "vision_config": CLIP},
}
TOKEN_IDS = torch.tensor([[3, 17, 25, 9, 30, 12], [21, 8, 14, 33, 5, 28]])


def tiny(family: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **settings})
    torch.manual_seed(0)
    return loud(transformers.AutoModelForCausalLM.from_config(config).eval())


def tiny_wrapper(family: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    return loud(getattr(transformers, f"{family}ForConditionalGeneration")(config).eval())


@torch.no_grad()
def loud(model: Any) -> Any:
    """A model of logits so large that a scale, a softcap or a bias left out shows in them."""
    head = model.get_output_embeddings()
    head.weight.mul_(30)
    if getattr(head, "bias", None) is not None:
        head.bias.normal_()
    return model


def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head reads, and the model's own logits of each first position."""
    states, outputs = run_to_head(model, model, input_ids=TOKEN_IDS)
    return states, outputs.logits


@torch.no_grad()
def assert_logits_are_the_models(model: Any) -> None:
    head = lm_head_of(model)
    states, first = run(model)
    expected = model(input_ids=TOKEN_IDS).logits
    logits = formulas.logits(states, head)
    torch.testing.assert_close(logits, expected)
    assert first.shape == (2, 1, 40)
    torch.testing.assert_close(first, expected[:, :1])
    check_head(head, states, first)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models(family):
    assert_logits_are_the_models(tiny(family))


@pytest.mark.parametrize("family", WRAPPERS)
def test_logits_are_those_of_models_around_a_text_model(family):
    assert_logits_are_the_models(tiny_wrapper(family, **WRAPPERS[family]))


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere", "Granite", "GPT2"])
def test_a_tied_head_is_the_embedding(family):
    model = tiny(family, tie_word_embeddings=True)
    assert lm_head_of(model).weight is model.get_input_embeddings().weight
    assert_logits_are_the_models(model)


@pytest.mark.parametrize("family", ["Phi", "Phimoe", "GPTJ", "CodeGen", "Bert"])
def test_a_bias_is_the_models(family):
    model = tiny(family)
    assert lm_head_of(model).bias is model.get_output_embeddings().bias is not None


@pytest.mark.parametrize(
    ("family", "logit_scale", "softcap"),
    [
        ("Gemma2", 1.0, 5.0),
        ("xLSTM", 1.0, 5.0),
        ("Cohere", 0.25, None),
        ("Granite", 0.25, None),
        ("HyperCLOVAX", 4.0, None),
        ("MiniCPM3", 1.0, None),
        ("Mpt", 1.0, None),
    ],
)
def test_the_numbers_of_a_head(family, logit_scale, softcap):
    head = lm_head_of(tiny(family))
    assert (head.logit_scale, head.softcap) == (logit_scale, softcap)


def with_adapter(family: str, **settings: Any) -> Any:
    config = peft.LoraConfig(r=2, init_lora_weights=False, **settings)
    return peft.get_peft_model(tiny(family), config).eval()


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere", "Granite", "Phi"])
def test_an_adapter_elsewhere_leaves_the_head(family):
    model = with_adapter(family, target_modules=["q_proj"])
    head, own = lm_head_of(model), model.get_base_model().lm_head
    assert head.weight is own.weight
    assert head == lm_head_of(model.get_base_model())
    assert_logits_are_the_models(model)


@pytest.mark.parametrize("family", ["Llama", "Granite", "Phi"])
def test_a_head_that_peft_trains_whole_is_the_one_that_is_trained(family):
    model = with_adapter(family, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapper = model.get_base_model().lm_head
    trained = wrapper.modules_to_save["default"]
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    head = lm_head_of(model)
    assert head.weight is trained.weight and head.weight.requires_grad
    assert head.bias is trained.bias
    assert_logits_are_the_models(model)
    with model.disable_adapter():
        assert lm_head_of(model).weight is wrapper.original_module.weight
        assert_logits_are_the_models(model)


def test_tokens_that_peft_trains_are_in_a_tied_head():
    base = tiny("Llama", tie_word_embeddings=True)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]}),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_()
    assert lm_head_of(model).weight.requires_grad
    assert_logits_are_the_models(model)


@pytest.mark.parametrize(
    "target",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_parameters": ["lm_head.weight"]}],
    ids=["modules", "parameters"],
)
def test_an_adapter_on_the_head_is_refused(target):
    model = with_adapter("Llama", **target)
    with pytest.raises(ValueError, match=r"modules_to_save"):
        lm_head_of(model)
    with pytest.raises(ValueError, match="merge_and_unload"):
        run(model)
    assert_logits_are_the_models(model.merge_and_unload())


def chameleon() -> Any:
    """A model that forbids the tokens of its images."""
    latents = {
        "num_embeddings": 1,
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "resolution": 8,
    }
    return tiny_wrapper(
        "Chameleon",
        **{**LLAMA, "num_key_value_heads": 2},
        vocabulary_map={"IMGIMGBS": 5, "<image>": 6},
        vq_config=latents,
    )


def prophet() -> Any:
    """A model whose head reads more than it gives logits of."""
    sizes = {"decoder_ffn_dim": 16, "num_decoder_layers": 1, "num_decoder_attention_heads": 2}
    config = transformers.ProphetNetConfig(**TOKENS, **sizes, vocab_size=40, hidden_size=16)
    torch.manual_seed(0)
    return loud(transformers.ProphetNetForCausalLM(config).eval())


@pytest.mark.parametrize(
    "build",
    [chameleon, lambda: tiny("InklingText", unpadded_vocab_size=37), prophet],
    ids=["forbidden tokens", "padded vocabulary", "more than one stream"],
)
@torch.no_grad()
def test_what_a_model_does_beside_its_head_is_refused(build):
    model = build()
    states, first = run(model)
    with pytest.raises(ValueError, match="does something else"):
        check_head(lm_head_of(model), states, first)


@pytest.mark.parametrize(
    "change",
    [
        {"logit_scale": 2.0},
        {"softcap": 1.0},
        {"bias": torch.linspace(-3, 3, 40)},
        {"bias": torch.full((40,), 3.0)},
    ],
    ids=["scale", "softcap", "bias", "shift"],
)
@torch.no_grad()
def test_a_head_that_is_not_the_models_is_refused(change):
    model = tiny("Llama")
    states, first = run(model)
    with pytest.raises(ValueError, match="does something else"):
        check_head(lm_head_of(model)._replace(**change), states, first)


def test_the_model_is_left_as_it_was():
    model = tiny("Llama")
    run(model)
    assert model(input_ids=TOKEN_IDS).logits.shape == (2, 6, 40)


def test_models_without_a_head_are_refused():
    config = transformers.LlamaConfig(**LLAMA)
    with pytest.raises(ValueError, match="LlamaModel, which has none"):
        lm_head_of(transformers.LlamaModel(config))
    with pytest.raises(ValueError, match="encoder-decoder"):
        lm_head_of(
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=40, d_model=16, num_layers=1, d_ff=16, num_heads=2)
            )
        )


def test_heads_that_cannot_be_read_are_refused():
    model = tiny("Llama")
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="in memory"):
        lm_head_of(model)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(40, 16, dtype=torch.int8), False)
    with pytest.raises(ValueError, match="left out of quantisation"):
        lm_head_of(model)

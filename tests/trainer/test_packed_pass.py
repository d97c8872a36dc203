"""A model that packing would disturb, or whose head is not understood, is refused by name; others pass."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.models.llama.modeling_llama import LlamaModel

from client.errors import ModelError
from trainer.data.packing import Layout, Sharing
from trainer.settings import Lora
from trainer.training.lora import compute_loss_in_forward, decoder_of, own_dropout, switch_off, unfit, with_lora
from trainer.training.packing_check import attentions, check_alone, check_packing, choose

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
MODELS = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0, "sliding_window": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "llama4_text": {
        "head_dim": 16, "num_local_experts": 2, "attention_chunk_size": 100, "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 1],
    },
}  # fmt: skip
INKLING = {
    "head_dim": 16, "swa_head_dim": 16, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "rel_extent": 64,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def adapted(kind, dtype=torch.float32, targets=("q_proj", "v_proj"), **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **MODELS.get(kind, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model = get_peft_model(model, LoraConfig(target_modules=list(targets), lora_dropout=0.05))
    compute_loss_in_forward(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "gpt_neo"])
def test_models_that_keep_packed_trajectories_apart_pass_whatever_follows_their_head(kind, dtype):
    check_packing(adapted(kind, dtype), kind)


@pytest.mark.parametrize(
    ("kind", "targets", "own"),
    [
        ("recurrent_gemma", ["q_proj"],
         {"logits_soft_cap": 0.5, "block_types": ["recurrent", "attention"], "attention_window_size": 8}),
        ("xlstm", ["q"], {"output_logit_soft_cap": 0.5, "num_heads": 2, "hidden_size": 64}),
        ("hyperclovax", ["q_proj"], {"logits_scaling": 8.0}),
        ("inkling_text", ["o_proj"], {"logits_mup_width_multiplier": 8.0, **INKLING}),
    ],
)  # fmt: skip
def test_logits_are_the_models_own_whatever_a_family_calls_that_which_changes_them(kind, targets, own):
    check_alone(adapted(kind, targets=targets, **own), kind)


@pytest.mark.parametrize(("kind", "odd"), [("falcon_mamba", "out_proj"), ("llama4_text", "router")])
def test_all_linear_layers_are_those_that_lora_can_be_on(kind, odd):
    """PEFT refuses a Mamba's out_proj; a router that is a linear layer gives more than a tensor."""
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **MODELS.get(kind, {}), "state_size": 8})
    model = transformers.AutoModelForCausalLM.from_config(config)
    refused = rf"--targets: LoRA cannot be on {odd} of some/model; its linear layers are (?!.*{odd})"
    with pytest.raises(ModelError, match=refused):
        with_lora(model, "some/model", Lora(targets=(odd,)))
    whole = with_lora(model, "some/model", Lora(targets=("all-linear",)))
    adapted_layers = {name.partition(".lora_A")[0].rpartition(".")[2] for name, _ in whole.named_parameters()}
    assert odd not in adapted_layers and {"in_proj", "q_proj"} & adapted_layers
    check_alone(whole, "some/model")


def test_a_linear_layer_that_takes_no_single_token_gets_no_adapter():
    class Grouped(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states.reshape(-1, 2, self.in_features))

    model = adapted("llama").unload()
    model.model.layers[0].mlp.up_proj.__class__ = Grouped
    assert unfit(model) == {"up_proj"}


def test_a_model_whose_state_runs_across_trajectories_is_refused_by_name():
    mamba = adapted("mamba", targets=("in_proj", "x_proj"), state_size=8)
    with pytest.raises(ModelError, match="some/mamba"):
        check_packing(mamba, "some/mamba")


def test_attention_that_ignores_the_packs_is_refused(monkeypatch):
    """What transformers detects packs by, taken away."""
    model = adapted("llama")
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    with pytest.raises(ModelError, match=r"some/llama: trajectories packed into one sequence disturb each other"):
        check_packing(model, "some/llama")


@pytest.mark.parametrize(
    ("kind", "changes", "lengths"),
    [
        ("gpt_neo", {"max_position_embeddings": 128}, [30] * 6),  # its mask has no more rows
        ("gpt_neo", {"max_position_embeddings": 128}, [20, 80, 80]),
        ("llama4_text", {"attention_chunk_size": 8, "no_rope_layers": [1, 0]}, [30, 50]),  # chunks begin anew
        ("llama4_text", {}, [30] * 6),  # in the fourth
        ("llama4_text", {}, [50] * 4 + [30] * 4),  # not if those of 50 come first
        ("llama4_text", {}, [50] * 9 + [25]),  # a chunk ends between those of 50, and within one behind that of 25
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_full_pass_or_one_of_unequal_lengths_would_change_gets_rows(kind, changes, lengths, dtype):
    model = adapted(kind, dtype, **changes)
    assert choose(model, "some/model", lengths, 180, packing=True, attention=None).layout.sharing == Sharing.PADDED


def test_a_model_whose_tokens_change_those_before_them_is_refused(monkeypatch):
    forward = LlamaModel.forward

    def with_the_last(self, **words):
        found = forward(self, **words)
        found.last_hidden_state = found.last_hidden_state + found.last_hidden_state[:, -1:]
        return found

    monkeypatch.setattr(LlamaModel, "forward", with_the_last)
    with pytest.raises(ModelError, match="some/llama: a token changes the logits before it"):
        check_alone(adapted("llama"), "some/llama")


def test_a_head_that_reads_other_states_than_the_decoders_is_refused_by_name():
    tokens = dict.fromkeys(("bos_token_id", "cls_token_id", "sep_token_id"), 2)
    config = transformers.AutoConfig.for_model("modernbert-decoder", **{**SMALL, **tokens})
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert decoder_of(model) is model.model
    with pytest.raises(ModelError, match=r"some/bert has no layer v_projection; its linear layers are .*q_proj"):
        with_lora(model, "some/bert", Lora(targets=("v_projection",)))
    with pytest.raises(ModelError, match="some/bert: the model's logits are not its LM head's"):
        check_alone(with_lora(model, "some/bert", Lora(targets=("q_proj",))), "some/bert")


def test_an_adapter_that_gets_no_gradient_is_refused_before_the_first_step(monkeypatch):
    forward = LlamaModel.forward

    def in_place(self, **words):
        found = forward(self, **words)
        found.last_hidden_state.sigmoid_().add_(1)
        return found

    monkeypatch.setattr(LlamaModel, "forward", in_place)
    with pytest.raises(ModelError, match=r"some/llama cannot be trained: .* modified by an inplace operation"):
        check_alone(adapted("llama"), "some/llama")


def test_noise_of_training_that_no_option_switches_off_is_told(monkeypatch):
    forward = LlamaModel.forward

    def noisy(self, **words):
        found = forward(self, **words)
        if self.training:
            found.last_hidden_state = found.last_hidden_state * torch.rand(1)
        return found

    calm = choose(adapted("llama"), "some/llama", [30, 50], 100, packing=True, attention=None)
    monkeypatch.setattr(LlamaModel, "forward", noisy)
    choice = choose(adapted("llama"), "some/llama", [30, 50], 100, packing=True, attention=None)
    assert calm.said(100, [30], "cpu") == [] and "--dropout 0 does not" in choice.said(100, [30], "cpu")[0]


def test_dropout_of_a_models_own_is_found_whatever_it_is_called():
    torch.manual_seed(0)
    config = transformers.GPTBigCodeConfig(vocab_size=97, n_embd=32, n_head=2, n_layer=1, n_positions=64)
    model = get_peft_model(
        transformers.GPTBigCodeForCausalLM(config), LoraConfig(target_modules=["c_attn"], lora_dropout=0.05)
    )
    switch_off(own_dropout(model.get_base_model()))
    ids = torch.arange(40)[None]
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
    assert [module.p for name, module in model.named_modules() if name.endswith("lora_dropout.default")] == [0.05]


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_logits_that_are_not_understood_are_refused(kind, monkeypatch):
    model = adapted(kind)
    monkeypatch.setattr("trainer.training.lora.Head.__call__", lambda self, hidden: self.linear(hidden))
    with pytest.raises(ModelError, match="not its LM head's"):
        check_packing(model, f"some/{kind}")


def test_the_first_attention_that_computes_the_same_is_taken_and_the_others_are_named(monkeypatch):
    wanted = ["flash_attention_2", "eager"], ["flash_attention_3: not installed"]
    monkeypatch.setattr("trainer.training.packing_check.attentions", lambda model, device: wanted)
    model = adapted("llama")
    choice = choose(model, "some/llama", [30, 50], 100, packing=True, attention=None)
    assert choice.layout == Layout() and choice.attention == model.config._attn_implementation == "eager"
    (said,) = choice.said(100, [30, 50], "cpu")
    assert said.startswith("attention: eager; not flash_attention_3: not installed; not flash_attention_2: ")
    assert choose(model, "some/llama", [30, 50], 100, packing=True, attention="eager").said(100, [30], "cpu") == []


def test_attention_that_computes_something_else_is_left_out(monkeypatch):
    """sdpa leaves out Gemma 2's cap of attention."""
    monkeypatch.setattr("trainer.training.packing_check.attentions", lambda model, device: (["sdpa"], []))
    model = adapted("gemma2", attn_logit_softcapping=0.2)
    model.get_base_model().set_attn_implementation("eager")
    choice = choose(model, "some/gemma2", [30, 50], 100, packing=True, attention=None)
    assert choice.attention == model.get_base_model().config._attn_implementation == "eager"
    assert "sdpa: logits differ by" in choice.others[0]


def test_on_a_gpu_flash_attention_is_wanted_first_then_flex_attention(monkeypatch):
    half, full = adapted("llama", torch.bfloat16).get_base_model(), adapted("llama").get_base_model()
    names, others = attentions(half, "cuda")
    assert names == ["flex_attention"] and others == ["flash_attention_2: flash-attn is not installed"]
    monkeypatch.setattr("trainer.training.packing_check.is_flash_attn_2_available", lambda: True)
    assert attentions(half, "cuda")[0] == ["flash_attention_2", "flex_attention"] and attentions(half, "cpu")[0] == []
    assert attentions(full, "cuda") == (["flex_attention"], ["flash_attention_2: it needs --dtype bfloat16"])
    half.model.layers[0].self_attn.attention_dropout = 0.1
    names, others = attentions(half, "cuda")
    assert names == ["flash_attention_2"] and others[0].startswith("flex_attention: it has no dropout, and the model")

"""Finding, loading and opening causal language models."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmdistill.errors import UserError
from llmdistill.models import check_head, last_hidden_states, load_causal_lm, load_config, locate, output_head

ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 8},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 64},
    "gpt_neox": {},
    "phi": {},  # its head has a bias
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_times_head_are_the_models_own_logits(architecture):
    common = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(common | ARCHITECTURES[architecture]))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # larger than initialised, so that caps and scales matter
        parameter.data += 0.2 * torch.randn_like(parameter)
    inputs = {"input_ids": torch.arange(3, 17).view(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with torch.no_grad():
        hidden, last = last_hidden_states(model, inputs)
        expected = model(**inputs).logits
    head = output_head(model)
    check_head(head, hidden, last, "model")
    torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-4, atol=1e-4)
    assert last.shape == (2, 1, 97)
    torch.testing.assert_close(output_head(model, 50).logits(hidden), expected[..., :50], rtol=1e-4, atol=1e-4)


def test_a_head_that_does_something_else_is_found_out(make_model):
    model = make_model()
    hidden, last = last_hidden_states(model, {"input_ids": torch.arange(8)[None]})
    with pytest.raises(ValueError, match="teacher's architecture"):
        check_head(output_head(model), hidden, 1.5 * last, "teacher")


def test_gradients_reach_the_parameters_through_both(make_model):
    model = make_model()
    hidden, _ = last_hidden_states(model, {"input_ids": torch.arange(8)[None]})
    output_head(model).logits(hidden).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("./nowhere", "no model folder"),
        ("a/b/c", "no model folder"),
        ("samples/smollm", "no sample model"),
        ("someone/nothing", "neither a model folder here nor"),
    ],
)
def test_missing_models_are_named(name, complaint):
    with pytest.raises(UserError, match=complaint):
        load_config(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        locate(str(tmp_path))


def test_pickled_weights_are_not_opened(make_model, tmp_path):
    model = make_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights must be safetensors"):
        load_causal_lm(str(tmp_path))

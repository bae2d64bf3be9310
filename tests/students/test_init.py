"""Cutting layers: which ones, and that the rest is the teacher."""

import pytest
import torch

from llmdistill.students.init import choose_layers, cut_layers, layer_scores


@pytest.fixture
def probe(tokenizer):
    ids = torch.randint(5, len(tokenizer), (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def hidden_states(model, probe):
    with torch.no_grad():
        return model.get_decoder()(**probe, use_cache=False).last_hidden_state[probe["attention_mask"].bool()]


def test_a_score_is_the_squared_change_of_the_output_without_the_layer(make_model, probe):
    model = make_model(layers=4)
    scores = layer_scores(model, probe)
    for layer in range(4):
        without = make_model(layers=4)
        cut_layers(without, [index for index in range(4) if index != layer])
        expected = (hidden_states(model, probe) - hidden_states(without, probe)).square().sum(-1).mean()
        assert scores[layer] == pytest.approx(expected.item(), rel=1e-4)


def test_scoring_leaves_the_model_as_it_was(make_model, probe):
    model = make_model(layers=4)
    before = hidden_states(model, probe)
    layer_scores(model, probe)
    torch.testing.assert_close(hidden_states(model, probe), before, rtol=0, atol=0)


def test_an_idle_layer_is_cut_first(make_model, probe):
    model = make_model(layers=4)
    for matrix in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        torch.nn.init.zeros_(matrix.weight)  # the layer passes its input through
    assert choose_layers(layer_scores(model, probe), 3) == [0, 1, 3]


def test_a_cut_model_loads_again_with_the_same_answers(make_model, probe, tmp_path):
    from transformers import AutoModelForCausalLM

    teacher, student = make_model(layers=4), make_model(layers=4)
    cut_layers(student, [0, 3])
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 2
    torch.testing.assert_close(loaded.lm_head.weight, teacher.lm_head.weight)
    torch.testing.assert_close(loaded.model.layers[1].mlp.up_proj.weight, teacher.model.layers[3].mlp.up_proj.weight)
    torch.testing.assert_close(hidden_states(loaded, probe), hidden_states(student, probe))


def test_settings_per_layer_are_cut_too(tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, layer_types=kinds, use_sliding_window=True, sliding_window=4,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    cut_layers(model, [0, 1, 3])
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


def test_gpt2_is_cut_as_well(tokenizer, probe):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=4)).eval()
    scores = layer_scores(model, probe)
    cut_layers(model, choose_layers(scores, 2))
    assert len(model.transformer.h) == model.config.num_hidden_layers == 2


@pytest.mark.parametrize("kept", [[], [0, 0], [2, 1], [0, 4], [-1, 0]])
def test_impossible_lists_are_refused(make_model, kept):
    with pytest.raises(ValueError, match="rising list of numbers from 0 to 3"):
        cut_layers(make_model(layers=4), kept)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="has 4 layers"):
        choose_layers([1.0] * 4, 5)

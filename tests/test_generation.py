"""TransformersGenerator on a tiny model: what it continues, where it stops, what it leaves as it was."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers")

from asft_kernels.models.generation import PromptTooLong, TransformersGenerator
from tiny_lm import saved_tiny_model, tiny_model, tiny_tokenizer

PROMPTS = ["abc", "a longer prompt here", "x"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(initializer_range=0.5)


def generator(model, batch_size=2, chat=False):
    return TransformersGenerator(model, tiny_tokenizer(chat=chat), batch_size=batch_size)


class Answers:
    """A model that answers with given rows of ids."""

    def __init__(self, model, rows):
        self.model, self.rows = model, rows

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, input_ids, **options):
        self.options = options
        return torch.cat([input_ids, torch.tensor(self.rows)], dim=1)


def test_greedy_is_the_argmax_of_each_step_whatever_stands_beside(model):
    tokenizer = tiny_tokenizer()
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert 1 not in ids[0, start:], "the model ends: choose another"
        texts.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    assert len(set(texts)) > 1
    for batch_size in (1, 2, 8):
        assert generator(model, batch_size).generate(PROMPTS, max_new_tokens=6) == texts


def test_greedy_ignores_sampling_settings_of_the_model(model, monkeypatch):
    plain = generator(model).generate(PROMPTS, max_new_tokens=4)
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "temperature", 9.0)
    assert generator(model).generate(PROMPTS, max_new_tokens=4) == plain


def test_sampling_follows_the_seed_and_leaves_the_callers_random_numbers(model):
    sample = dict(max_new_tokens=8, temperature=1.0)
    before = torch.random.get_rng_state()
    first = generator(model).generate(PROMPTS, **sample, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    assert generator(model).generate(PROMPTS, **sample, seed=1) == first
    assert generator(model).generate(PROMPTS, **sample, seed=2) != first


def test_top_k_1_and_a_tiny_top_p_are_greedy(model):
    greedy = generator(model).generate(PROMPTS, max_new_tokens=6)
    for limit in (dict(top_k=1), dict(top_p=1e-6)):
        assert generator(model).generate(PROMPTS, max_new_tokens=6, temperature=1.0, **limit) == greedy


def test_stops_at_the_models_and_the_tokenizers_end(model, monkeypatch):
    a, b, c, other = (tiny_tokenizer()(char)["input_ids"][0] for char in "abc!")
    rows = [[a, b, 1, c], [a, other, 1, 1], [a, b, c, a]]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [other])
    answers = Answers(model, rows)
    texts = generator(answers, batch_size=3).generate(PROMPTS, max_new_tokens=4)
    assert texts == ["ab", "a", "abca"]
    assert answers.options["eos_token_id"] == [1, other], "none is generated beyond its end"


@pytest.mark.parametrize(
    ("chat", "rendered"),
    [
        ([{"role": "user", "content": "hi"}], "<turn>user\nhi<eos>\n<turn>assistant\n"),
        (
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}],
            "<turn>user\nhi<eos>\n<turn>assistant\nWell, ",
        ),
    ],
    ids=["answers", "continues"],
)
def test_chats_go_through_the_template(model, chat, rendered):
    plain = generator(model).generate([rendered], max_new_tokens=6)
    assert generator(model, chat=True).generate([chat], max_new_tokens=6) == plain


def test_a_prompt_that_begins_with_bos_gets_no_second_one(model):
    from tokenizers.processors import TemplateProcessing

    made = generator(model)
    made.tokenizer.bos_token = "<turn>"
    made.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<turn> $A <eos>", pair=None, special_tokens=[("<turn>", 2), ("<eos>", 1)]
    )
    a = tiny_tokenizer()("a")["input_ids"]
    assert made._encode("a") == [2, *a], "BOS once, and no end before the answer"
    assert made._encode("<turn>a") == [2, *a]


def test_training_mode_comes_back_and_dropout_is_off():
    model = tiny_model(initializer_range=0.5, attention_dropout=0.9)
    evaluated = generator(model.eval()).generate(PROMPTS, max_new_tokens=6)
    assert not model.training
    assert generator(model.train()).generate(PROMPTS, max_new_tokens=6) == evaluated
    assert model.training


def test_prompt_too_long_is_named_before_anything_is_generated(model):
    with pytest.raises(PromptTooLong) as problem:
        generator(Answers(model, None)).generate(["a", "b" * 250], max_new_tokens=7)
    assert str(problem.value) == (
        "prompts[1]: 250 tokens and max_new_tokens 7, need at most 256 together: the model has no more positions"
    )
    assert problem.value.index == 1
    generator(model).generate(["b" * 250], max_new_tokens=6)


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ("a", dict(max_new_tokens=0), "max_new_tokens: got 0, need at least 1"),
        ("a", dict(temperature=-1.0), "temperature: got -1.0, need a number >= 0"),
        ("a", dict(temperature=float("nan")), "temperature: got nan, need a number >= 0"),
        ("a", dict(top_k=-1), "top_k, top_p: got -1, 1.0; need"),
        ("a", dict(top_p=0.0), "top_k, top_p: got 0, 0.0; need"),
        ("", {}, r"prompts\[0\]: has no token"),
        ([{"role": "user", "content": "a"}], {}, "the tokenizer has no chat template"),
    ],
)
def test_errors(model, prompt, options, text):
    with pytest.raises(ValueError, match=text):
        generator(model).generate([prompt], **{"max_new_tokens": 2, **options})


def test_batch_size_error(model):
    with pytest.raises(ValueError, match="batch_size: got 0, need at least 1"):
        generator(model, batch_size=0)


def test_from_pretrained(tmp_path):
    folder = saved_tiny_model(tmp_path / "model")
    loaded = TransformersGenerator.from_pretrained(str(folder))
    expected = generator(tiny_model()).generate(PROMPTS, max_new_tokens=3)
    assert loaded.generate(PROMPTS, max_new_tokens=3) == expected
    (tmp_path / "empty").mkdir()
    for name, text in [
        (tmp_path / "nowhere", "no such folder, and no hub name either; need a folder"),
        (folder / "config.json", "a file; need a folder"),
        (tmp_path / "empty", "cannot be loaded as a causal language model"),
    ]:
        with pytest.raises(ValueError, match=text):
            TransformersGenerator.from_pretrained(str(name))

"""Constrained output judged by other parsers: json, jsonschema and re."""

import json
import re
import sys

import jsonschema
import numpy as np
import pytest
from bpe import VOCAB, bpe_tokenizer
from fake_engine import FakeEngine, small_build
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llm import check_idle, disturb, smallest_budget

from minicache_trt.config import KvCacheConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams
from minicache_trt.runtime.sampling_params import GuidedDecodingParams

EOS = 1
PROMPT = list(range(2, 150))


def make_llm(eos_token_ids=(EOS,), scarce=False, tokenizer=bpe_tokenizer, **build):
    engine = FakeEngine(small_build(**build), eos_token_ids=eos_token_ids, vocab=VOCAB + 9)
    memory = int(1.1 * smallest_budget(engine)) if scarce else None
    return LLM.from_engine(engine, tokenizer=tokenizer(), kv_cache_config=KvCacheConfig(memory))


def guided(seed=0, max_tokens=300, temperature=1.0, **constraint):
    constraint = GuidedDecodingParams(**constraint)
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, guided_decoding=constraint)


def complete(llm, params, prompts=(PROMPT,)):
    return [output.outputs[0] for output in llm.generate(list(prompts), params)]


names = st.text("abcxyz_", min_size=1, max_size=5)
leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)}, *[st.integers(-999, 999)] * 2
    ),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 8)),
    st.builds(lambda p: {"type": "string", "pattern": p}, st.sampled_from(["^[a-c]{2,4}$", "^x[0-9]+$", "^(on|off)$"])),
    st.builds(
        lambda v: {"enum": v}, st.lists(st.one_of(names, st.integers(-9, 9)), min_size=1, max_size=4, unique=True)
    ),
    st.builds(lambda v: {"const": v}, names),
)


def containers(children):
    objects = st.builds(
        lambda properties, drop: {
            "type": "object",
            "properties": properties,
            "required": list(properties)[drop:],
            "additionalProperties": False,
        },
        st.dictionaries(names, children, min_size=1, max_size=4),
        st.integers(0, 2),
    )
    arrays = st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        children,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    either = st.builds(lambda a, b: {"anyOf": [a, b]}, children, children)
    return st.one_of(objects, arrays, either)


schemas = st.recursive(leaves, containers, max_leaves=6)


@settings(max_examples=30, deadline=None)
@given(schemas, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.7, 3.0]), st.sampled_from([None, "", " ?"]))
def test_random_schemas(schema, seed, temperature, whitespace):
    params = guided(seed, temperature=temperature, json=schema, whitespace_pattern=whitespace)
    (completion,) = complete(make_llm(), params)
    if completion.finish_reason == "length":  # greedy decoding may go round in circles inside a string or a number
        assert len(completion.token_ids) == 300
        return
    assert completion.finish_reason == "stop" and completion.token_ids[-1] == EOS
    jsonschema.validate(json.loads(completion.text), schema)


def test_a_schema_that_always_ends_is_always_completed():
    schema = {
        "type": "object",
        "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 9999}, "tag": {"enum": ["a", "b", "c"]}},
        "required": ["id", "tag"],
        "additionalProperties": False,
    }
    completions = complete(make_llm(), [guided(seed, json=schema) for seed in range(8)], [PROMPT] * 8)
    values = [json.loads(completion.text) for completion in completions]
    for value in values:
        jsonschema.validate(value, schema)
    assert len({json.dumps(value) for value in values}) > 4
    assert all(completion.token_ids[-1] == EOS for completion in completions)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(
        [
            "[0-9]{3}-[a-f]{2,}",
            "(cat|dog)s? sat",
            "a?b{2,3}c*",
            r"[0-9]{1,3}(\.[0-9]{1,3}){3}",
            "[^x]{4}",
            "naïve|café|猫",
        ]
    ),
    st.integers(0, 2**32 - 1),
)
def test_regular_expressions(pattern, seed):
    (completion,) = complete(make_llm(), guided(seed, 60, regex=pattern))
    if completion.finish_reason == "stop":
        assert re.fullmatch(pattern, completion.text)
        assert completion.token_ids[-1] == EOS
    else:
        assert completion.finish_reason == "length" and len(completion.token_ids) == 60


def test_choices_and_grammars():
    llm = make_llm()
    choice = ["yes", "no", 'with "quotes" and \\', "naïve 🐱\n"]
    texts = {c.text for c in complete(llm, [guided(s, choice=choice) for s in range(20)], [PROMPT] * 20)}
    assert texts <= set(choice) and len(texts) > 1
    grammar = 'start: pair+\npair: "(" [pair] ")"\n'
    for completion in complete(llm, [guided(s, 200, grammar=grammar) for s in range(8)], [PROMPT] * 8):
        depth = 0
        for character in completion.text:
            depth += {"(": 1, ")": -1}[character]
            assert depth >= 0
        assert completion.finish_reason == "length" or depth == 0


def test_json_objects():
    for completion in complete(make_llm(), [guided(s, json_object=True) for s in range(6)], [PROMPT] * 6):
        if completion.finish_reason == "stop":
            assert isinstance(json.loads(completion.text), dict)
        else:
            assert completion.text.startswith("{")


def test_max_tokens_cut_the_output_short():
    (completion,) = complete(make_llm(), guided(max_tokens=5, json_object=True, temperature=0))
    assert completion.finish_reason == "length" and len(completion.token_ids) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_preemption_and_neighbours_change_nothing(temperature):
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 30}
    params = [guided(seed, 150, temperature, json=schema, whitespace_pattern="") for seed in range(5)]
    alone = [complete(make_llm(), item)[0].token_ids for item in params]
    llm = make_llm(scarce=True)
    disturb(llm, 7)
    together = complete(llm, params, [PROMPT] * 5)
    check_idle(llm)
    assert llm.statistics.preemptions > 0
    assert [completion.token_ids for completion in together] == alone


def test_log_probabilities_are_of_the_raw_logits():
    params = SamplingParams(
        max_tokens=3, temperature=0, logprobs=0, guided_decoding=GuidedDecodingParams(regex="[0-9]{3}")
    )
    llm = make_llm()
    (completion,) = complete(llm, params)
    rows = llm.score([PROMPT + completion.token_ids], [len(PROMPT)], start=len(PROMPT) - 1)[0].astype(float)
    for row, token, entry in zip(rows, completion.token_ids, completion.logprobs, strict=False):
        shifted = row - row.max()
        expected = shifted[token] - np.log(np.exp(shifted).sum())
        assert entry[token].logprob == pytest.approx(expected, abs=1e-9)
    assert any(entry[token].rank > 1 for token, entry in zip(completion.token_ids, completion.logprobs, strict=True))


def test_models_without_an_end_token_stop_when_the_output_is_complete():
    (completion,) = complete(make_llm(eos_token_ids=()), guided(regex="[0-9]{3}"))
    assert completion.finish_reason == "stop" and re.fullmatch("[0-9]{3}", completion.text)
    params = SamplingParams(max_tokens=30, ignore_eos=True, guided_decoding=GuidedDecodingParams(regex="[0-9]{3}"))
    (completion,) = complete(make_llm(), params)
    assert completion.finish_reason == "stop" and re.fullmatch("[0-9]{3}", completion.text)
    assert EOS not in completion.token_ids


def test_any_of_several_end_tokens_may_end():
    lasts = {complete(make_llm((EOS, 305)), guided(seed, choice=["a"]))[0].token_ids[-1] for seed in range(12)}
    assert lasts == {EOS, 305}


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"regex": "a(b"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"json": {"type": "nonsense"}}, "nonsense"),
        ({"json": "{"}, "EOF"),
        ({"grammar": "start: other"}, "unknown name"),
        ({"grammar": "start: " + "(" * 20000 + '"a"' + ")" * 20000}, "too deeply nested"),
        ({"regex": "(" * 100000 + ")" * 100000}, "maximum number of nested"),
        ({"json": {"$ref": "#"}}, ""),
        ({"json": {"$ref": "http://localhost/schema.json"}}, "not present in a registry"),
        ({"choice": ["\ud800"]}, "surrogates not allowed"),
    ],
)
def test_constraints_that_cannot_be_used_are_refused(constraint, message):
    llm = make_llm()
    with pytest.raises(UserError, match=f"^guided_decoding: .*{message}"):
        llm.generate([PROMPT], guided(**constraint))
    assert llm.engine.num_steps == 0


def test_a_grammar_that_grows_too_complex_ends_its_request_only():
    llm = make_llm()
    others = guided(regex="[0-9]{3}")
    bad, good = complete(llm, [guided(regex="(a{1000}){1000}"), others], [PROMPT] * 2)
    assert bad.finish_reason == "error" and bad.stop_reason.startswith("guided_decoding: lexer error: too many")
    assert good.token_ids == complete(make_llm(), others)[0].token_ids
    check_idle(llm)


@pytest.mark.parametrize("constraint", [{}, {"regex": "a", "json_object": True}, {"choice": []}, {"choice": [""]}])
def test_constraints_that_contradict_themselves(constraint):
    with pytest.raises(ValueError, match=r"^(guided_decoding|choice): expected .*, got "):
        GuidedDecodingParams(**constraint)


def test_a_tokenizer_that_is_not_fast_is_refused():
    class Slow:
        def encode(self, text):
            return [2]

        def decode(self, token_ids, **_):
            return ""

    with pytest.raises(UserError, match="needs a fast Hugging Face tokenizer"):
        make_llm(tokenizer=Slow).generate([PROMPT], guided(regex="a"))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        UserError, match=r"needs the package llguidance \(install it: pip install 'minicache-trt\[guided\]"
    ):
        make_llm().generate([PROMPT], guided(regex="a"))

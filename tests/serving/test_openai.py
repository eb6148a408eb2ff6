"""OpenAI's own client against a live server; what it gets equals `LLM.generate`."""

import json
import math
import re

import jsonschema
import openai
import pytest

from minicache_trt.runtime.request import SamplingParams
from tests.serving.live import MODEL, TEMPLATE

PROMPT = "def main(argv):\n    "
GREEDY = {"temperature": 0, "max_tokens": 20}


@pytest.fixture(scope="module")
def client(demo):
    return demo.openai


@pytest.fixture(scope="module")
def reference(demo_llm):
    """Another engine of the same model, called directly."""
    return demo_llm("kivi2")


def generated(llm, prompt, **params):
    return llm.generate(prompt, SamplingParams(**params))[0]


def chat_tokens(llm, messages):
    text = llm.tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    return llm.tokenizer.encode(text, add_special_tokens=False)


def test_models(client, demo):
    assert [model.id for model in client.models.list()] == [MODEL, "alias"]
    assert client.models.retrieve("alias").max_model_len == demo.llm.engine.build.max_seq_len
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")


def test_completions_equal_generate(client, reference):
    ids = reference.tokenizer.encode(PROMPT)
    expected = generated(reference, PROMPT, **GREEDY)
    for prompt in (PROMPT, ids):
        answer = client.completions.create(model=MODEL, prompt=prompt, **GREEDY)
        assert answer.choices[0].text == expected.outputs[0].text
        assert answer.choices[0].finish_reason == expected.outputs[0].finish_reason
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)
        assert answer.usage.total_tokens == len(ids) + 20
    several = client.completions.create(model=MODEL, prompt=[PROMPT, "import ", "class A"], n=2, seed=7, max_tokens=12)
    assert [choice.index for choice in several.choices] == list(range(6))
    for choice in several.choices:
        prompt = (PROMPT, "import ", "class A")[choice.index // 2]
        output = generated(reference, prompt, max_tokens=12, seed=7 + choice.index % 2).outputs[0]
        assert choice.text == output.text
    lists = client.completions.create(model=MODEL, prompt=[ids, ids[:2]], **GREEDY)
    assert lists.choices[0].text == expected.outputs[0].text and lists.usage.prompt_tokens == len(ids) + 2


def test_a_shared_prefix_is_reported(client):
    prompt = [2 + index % 500 for index in range(200)]
    first = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, extra_body={"cache_salt": "a"})
    again = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, extra_body={"cache_salt": "a"})
    other = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, extra_body={"cache_salt": "b"})
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, again, other)]
    assert cached == [0, 192, 0]


@pytest.mark.parametrize(
    "extra",
    [
        {"top_k": 5, "seed": 1},
        {"min_p": 0.1, "seed": 2},
        {"repetition_penalty": 1.4},
        {"ignore_eos": True, "min_tokens": 3},
        {"stop_token_ids": [200, 300, 400, 13, 14]},
    ],
)
def test_parameters_vllm_has(client, reference, extra):
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=25, temperature=0.9, extra_body={"seed": 3, **extra}
    )
    output = generated(reference, PROMPT, max_tokens=25, temperature=0.9, **{"seed": 3, **extra}).outputs[0]
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (output.text, output.finish_reason)
    assert answer.usage.completion_tokens == len(output.token_ids)


def test_penalties_and_bias(client, reference):
    options = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "temperature": 0, "max_tokens": 25}
    plain = client.completions.create(model=MODEL, prompt=PROMPT, **GREEDY).choices[0].text
    answer = client.completions.create(model=MODEL, prompt=PROMPT, logit_bias={"300": -100, "12": 4}, **options)
    output = generated(reference, PROMPT, logit_bias={300: -100.0, 12: 4.0}, **options).outputs[0]
    assert answer.choices[0].text == output.text != plain


def test_stop_strings(client, reference):
    whole = generated(reference, PROMPT, **GREEDY).outputs[0].text
    stop = whole[8:11]
    for options in ({"stop": stop}, {"stop": ["never", stop]}):
        answer = client.completions.create(model=MODEL, prompt=PROMPT, **GREEDY, **options).choices[0]
        assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")
        assert answer.stop_reason == stop
    chunks = [
        chunk.choices[0]
        for chunk in client.completions.create(model=MODEL, prompt=PROMPT, stop=stop, stream=True, **GREEDY)
    ]
    assert "".join(choice.text for choice in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == "stop"


def test_log_probabilities_of_completions(client, reference):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, logprobs=3, **GREEDY).choices[0]
    output = generated(reference, PROMPT, logprobs=3, **GREEDY).outputs[0]
    logprobs = answer.logprobs
    assert "".join(logprobs.tokens) == answer.text
    for token, logprob, entry in zip(output.token_ids, logprobs.token_logprobs, output.logprobs, strict=True):
        assert logprob == pytest.approx(entry[token].logprob, abs=1e-5)
    for top, entry in zip(logprobs.top_logprobs, output.logprobs, strict=True):
        assert sorted(top.values()) == pytest.approx(sorted(value.logprob for value in entry.values()), abs=1e-5)
    offsets = [
        answer.text.index(token, offset) for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True)
    ]
    assert offsets == logprobs.text_offset


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_with_log_probabilities_of_the_prompt(client, reference, max_tokens):
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
    )
    choice, ids = answer.choices[0], reference.tokenizer.encode(PROMPT)
    output = generated(reference, PROMPT, max_tokens=3, temperature=0).outputs[0]
    known = ids + output.token_ids[:max_tokens]
    assert choice.text == PROMPT + (output.text if max_tokens else "")
    assert len(choice.logprobs.tokens) == len(known) and choice.logprobs.token_logprobs[0] is None
    rows = reference.score([known], [len(ids)])[0].astype(float)
    for row, token, logprob in zip(rows, known[1:], choice.logprobs.token_logprobs[1:], strict=False):
        shifted = row - row.max()
        expected = shifted[token] - math.log(sum(math.exp(value) for value in shifted))
        assert logprob == pytest.approx(expected, abs=2e-3)


def test_streams_equal_whole_responses(client):
    options = {"model": MODEL, "prompt": [PROMPT, "import "], "n": 2, "seed": 5, "max_tokens": 15, "logprobs": 2}
    whole = client.completions.create(**options)
    texts, tokens, logprobs, reasons = ({index: [] for index in range(4)} for _ in range(4))
    usage = []
    for chunk in client.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        usage.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index].append(choice.text)
            reasons[choice.index].append(choice.finish_reason)
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens
                logprobs[choice.index] += choice.logprobs.token_logprobs
    for choice in whole.choices:
        assert "".join(texts[choice.index]) == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert logprobs[choice.index] == pytest.approx(choice.logprobs.token_logprobs, abs=1e-5)
        assert reasons[choice.index][-1] == choice.finish_reason
        assert set(reasons[choice.index][:-1]) <= {None}
    assert usage[:-1] == [None] * (len(usage) - 1)
    assert usage[-1].completion_tokens == whole.usage.completion_tokens
    assert usage[-1].prompt_tokens == whole.usage.prompt_tokens


def test_a_stream_ends_with_its_mark(demo):
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True}
    with demo.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-1])


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "write a function"}]


def test_chats_equal_generate(client, reference):
    ids = chat_tokens(reference, MESSAGES)
    output = generated(reference, ids, logprobs=2, **GREEDY).outputs[0]
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=20, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", output.text)
    assert answer.usage.prompt_tokens == len(ids)
    for token, entry, expected in zip(output.token_ids, choice.logprobs.content, output.logprobs, strict=True):
        assert entry.logprob == pytest.approx(expected[token].logprob, abs=1e-5) and len(entry.top_logprobs) == 2
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode() == output.text
    parts = [
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        MESSAGES[1],
    ]
    assert (
        client.chat.completions.create(model=MODEL, messages=parts, **GREEDY).choices[0].message.content == output.text
    )


def test_a_chat_without_a_limit_ends_at_the_context(client, demo):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == demo.llm.engine.build.max_seq_len
    assert answer.choices[0].finish_reason == "length"


def test_chat_streams(client):
    options = {"model": MODEL, "messages": MESSAGES, "seed": 3, "max_tokens": 12, "n": 2}
    whole = client.chat.completions.create(**options)
    contents, roles = {0: "", 1: ""}, {0: [], 1: []}
    stream = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            contents[choice.index] += choice.delta.content or ""
            roles[choice.index].append(choice.delta.role)
    assert contents == {choice.index: choice.message.content for choice in whole.choices}
    assert all(role[0] == "assistant" and set(role[1:]) <= {None} for role in roles.values())
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "item", "schema": SCHEMA, "strict": True}}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": ""}},
    ],
)
def test_json_schemas(client, fields):
    for seed in range(2):
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=200, seed=seed, extra_body=fields
        ).choices[0]
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.message.content), SCHEMA)


def test_other_constraints(client):
    def text(**fields):
        return (
            client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=100, seed=0, extra_body=fields)
            .choices[0]
            .text
        )

    assert re.fullmatch("[0-9]{2}:[0-9]{2}", text(guided_regex="[0-9]{2}:[0-9]{2}"))
    assert text(guided_choice=["left", "right"]) in ("left", "right")
    assert text(guided_grammar='start: "a" "b"+ "c"').startswith("ab")
    assert text(response_format={"type": "json_object"}).startswith("{")


def test_tokenizer_routes(demo, reference):
    ids = reference.tokenizer.encode(PROMPT)
    answer = demo.http.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (ids, len(ids), 512)
    assert "".join(answer["token_strs"][1:]) == PROMPT
    assert demo.http.post("/detokenize", json={"tokens": ids[1:]}).json() == {"prompt": PROMPT}
    chat = demo.http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert chat["tokens"] == chat_tokens(reference, MESSAGES)

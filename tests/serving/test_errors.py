"""Refusals: OpenAI's error object, one line, the field's name."""

import copy
import json

import openai
import pytest

from minicache_trt.runtime.llm import LLM
from tests.runtime.bpe import bpe_tokenizer
from tests.runtime.fake_engine import FakeEngine, small_build
from tests.serving.live import MODEL, Live, fake_llm

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def live():
    server = Live(fake_llm(max_seq_len=200))
    yield server
    server.close()


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        (COMPLETION, {}, "prompt", "Field required"),
        (COMPLETION, {"prompt": 3}, "prompt", "valid string"),
        (COMPLETION, {"prompt": []}, "prompt", "expected at least one"),
        (COMPLETION, {"prompt": [""]}, None, "expected at least one token"),
        (COMPLETION, {"prompt": [[1], []]}, None, "expected at least one token"),
        (COMPLETION, {"prompt": [1, "a"]}, "prompt", "valid"),
        (COMPLETION, {"prompt": [True]}, "prompt", "valid"),
        (COMPLETION, {"prompt": [1000]}, None, "expected token ids from 0 to 299, got 1000"),
        (COMPLETION, {"prompt": [5] * 201}, None, "201 tokens, the engine was built for max_seq_len 200"),
        (COMPLETION, {"prompt": "a\ud800"}, None, "expected valid Unicode"),
        (COMPLETION, {"prompt": "a", "max_tokens": "5"}, "max_tokens", "valid integer"),
        (COMPLETION, {"prompt": "a", "max_tokens": 0}, "max_tokens", "expected a positive number"),
        (COMPLETION, {"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        (COMPLETION, {"prompt": "a", "temperature": -1}, "temperature", "expected a finite number of at least 0"),
        (COMPLETION, {"prompt": "a", "temperature": float("nan")}, "temperature", "expected a finite number"),
        (COMPLETION, {"prompt": "a", "top_p": 0}, "top_p", "expected a number in (0, 1]"),
        (COMPLETION, {"prompt": "a", "top_k": -5}, "top_k", "expected a positive number"),
        (COMPLETION, {"prompt": "a", "min_p": 2}, "min_p", "expected a number in [0, 1]"),
        (COMPLETION, {"prompt": "a", "presence_penalty": 3}, "presence_penalty", "expected a number in [-2, 2]"),
        (COMPLETION, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "expected token ids as keys, got 'x'"),
        (COMPLETION, {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "in [-100, 100]"),
        (COMPLETION, {"prompt": "a", "logit_bias": {"300": 1}}, "logit_bias", "expected token ids from 0 to 299"),
        (COMPLETION, {"prompt": "a", "stop": ""}, "stop", "strings that are not empty"),
        (COMPLETION, {"prompt": "a", "stop": [1]}, "stop", "valid string"),
        (COMPLETION, {"prompt": "a", "seed": -1}, "seed", "at least 0"),
        (COMPLETION, {"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        (COMPLETION, {"prompt": "a", "n": 10**9}, None, "asks for 1000000000 sequences"),
        (COMPLETION, {"prompt": "a", "best_of": 3}, "best_of", "leave best_of out"),
        (COMPLETION, {"prompt": "a", "suffix": "b"}, "suffix", "insertion is not supported"),
        (COMPLETION, {"prompt": "a", "use_beam_search": True}, "use_beam_search", "beam search is not supported"),
        (COMPLETION, {"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        (COMPLETION, {"prompt": "a", "priority": 0.5}, "priority", "valid integer"),
        (COMPLETION, {"prompt": "a", "cache_salt": ""}, "cache_salt", "text that is not empty"),
        (COMPLETION, {"prompt": "a", "guided_regex": "("}, "guided_decoding", "invalid regex"),
        (COMPLETION, {"prompt": "a", "guided_regex": "a", "guided_json": {}}, "guided_decoding", "one constraint"),
        (COMPLETION, {"prompt": "a", "guided_json": {"type": "x"}}, "guided_decoding", "x"),
        (COMPLETION, {"prompt": "a", "structured_outputs": {}}, "guided_decoding", "expected one of"),
        (COMPLETION, {"prompt": "a", "response_format": {"type": "xml"}}, "response_format", "json_object"),
        (COMPLETION, {"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        (CHAT, {"messages": []}, "messages", "at least 1 item"),
        (CHAT, {"messages": [{"content": "hi"}]}, "messages", "Field required"),
        (CHAT, {"messages": TALK, "tools": [{}]}, "tools", "calls of tools are not supported"),
        (CHAT, {"messages": TALK, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        (CHAT, {"messages": TALK, "max_completion_tokens": 0}, "max_completion_tokens", "positive"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "only text"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "template refuses"),
        ("/tokenize", {}, "prompt", "either prompt or messages"),
        ("/detokenize", {"tokens": [300]}, "tokens", "from 0 to 299"),
    ],
)
def test_what_cannot_be_used_is_named(live, path, fields, param, message):
    body = json.dumps(fields)
    response = live.http.post(path, content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert message in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert live.service.admission.wait_until_idle(10)


@pytest.mark.parametrize("body", ["", "{", "[]", "null", "3", '"x"', "\x00", "{" * 100000, "[" * 100000])
def test_bodies_that_are_no_objects(live, body):
    response = live.http.post(COMPLETION, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_bytes_that_are_no_text(live):
    response = live.http.post(COMPLETION, content=b'{"prompt": "\xff"}', headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and "error" in response.json()


def test_unknown_fields_and_nulls_are_ignored(live):
    nothing = dict.fromkeys(["n", "stop", "seed", "logprobs", "stream", "response_format", "logit_bias", "best_of"])
    body = {"prompt": [3, 4], "max_tokens": 2, "user": "me", "nonsense": {"a": 1}, "metadata": {}, **nothing}
    assert live.http.post(COMPLETION, json=body).json()["usage"]["completion_tokens"] <= 2


def test_unknown_models_routes_and_methods(live):
    with pytest.raises(openai.NotFoundError) as caught:
        live.openai.completions.create(model="gpt-5", prompt="a")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    for response, status in ((live.http.get("/nothing"), 404), (live.http.get(COMPLETION), 405)):
        assert response.status_code == status and "error" in response.json()
    assert live.http.post(COMPLETION, json={"model": "alias", "prompt": "a"}).json()["model"] == "alias"
    assert live.http.post(COMPLETION, json={"prompt": "a"}).json()["model"] == MODEL


def test_a_model_without_chat_template(serve):
    plain = serve(fake_llm(), http={"chat_template": None})
    with pytest.raises(openai.BadRequestError, match="tokenizer has no chat template; use /v1/completions, or start"):
        plain.openai.chat.completions.create(model=MODEL, messages=TALK)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system here') }}", "{{ unknown.field }}", "{% if %}", "{{ 1 / 0 }}"]
)
def test_a_template_that_refuses(serve, template):
    with pytest.raises(openai.BadRequestError, match="the chat template refuses them: "):
        serve(fake_llm(), http={"chat_template": template}).openai.chat.completions.create(model=MODEL, messages=TALK)


@pytest.mark.parametrize("several", [False, True])
def test_the_tokenizers_own_template_is_used(serve, several):
    tokenizer = copy.deepcopy(bpe_tokenizer())
    own = "[{{ messages[-1].content }}]"
    tokenizer.chat_template = {"default": own, "other": "{{ 1 / 0 }}"} if several else own
    live = serve(fake_llm(tokenizer), http={"chat_template": None})
    answer = live.openai.chat.completions.create(model=MODEL, messages=TALK, max_tokens=1)
    assert answer.usage.prompt_tokens == len(tokenizer.encode("[hi]", add_special_tokens=False))


def test_a_model_without_tokenizer_takes_token_ids(serve):
    live = serve(LLM.from_engine(FakeEngine(small_build())))
    answer = live.http.post(COMPLETION, json={"prompt": [3, 4], "max_tokens": 3, "logprobs": 1, "echo": True}).json()
    assert answer["usage"]["completion_tokens"] == 3 and len(answer["choices"][0]["logprobs"]["tokens"]) == 5
    for path, body in ((COMPLETION, {"prompt": "a"}), (CHAT, {"messages": TALK}), ("/tokenize", {"prompt": "a"})):
        assert live.http.post(path, json=body).status_code == 400
    assert live.http.post(COMPLETION, json={"prompt": [3], "guided_regex": "a"}).status_code == 400

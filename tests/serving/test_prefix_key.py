"""Where requests go by their beginnings."""

from __future__ import annotations

import json
from collections import Counter

from minicache_trt.serving.prefix_key import KEY_CHARACTERS, preferred, prefix_key


def key(**fields: object) -> str:
    return prefix_key(json.dumps(fields).encode())


def test_requests_that_begin_alike_have_one_key() -> None:
    start = "x" * KEY_CHARACTERS
    assert key(prompt=start + "a", max_tokens=3) == key(prompt=start + "b", temperature=1)
    assert key(prompt=start) == key(prompt=[start + "a", "other"])
    system = {"role": "system", "content": start}
    chats = [key(messages=[system, {"role": "user", "content": text}]) for text in ("a", "b")]
    assert chats[0] == chats[1] != key(messages=[{"role": "user", "content": "a"}])
    assert key(prompt=[1, 2, 3]) == key(prompt=[1, 2, 3]) != key(prompt=[1, 2, 4])


def test_other_beginnings_and_tenants_have_others() -> None:
    chat = key(messages=[{"role": "user", "content": "a"}])
    assert len({key(prompt="a"), key(prompt="b"), key(prompt="a", cache_salt="s"), chat}) == 4


def test_bodies_without_a_prompt_have_none() -> None:
    bodies = (b"", b"no json", b"[1]", b"3", b'{"prompt": ""}', b'{"prompt": null}', b"{}", b"\xff")
    assert [prefix_key(body) for body in bodies] == [""] * len(bodies)


def test_keys_spread_evenly_and_only_those_of_a_lost_replica_move() -> None:
    names = [f"replica{i}" for i in range(4)]
    keys = [str(i) for i in range(2000)]
    before = {k: preferred(k, names) for k in keys}
    assert all(400 < count < 600 for count in Counter(before.values()).values())
    after = {k: preferred(k, reversed(names[:3])) for k in keys}
    assert all(after[k] == before[k] for k in keys if before[k] != "replica3")

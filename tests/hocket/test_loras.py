"""How a request names LoRA adapters."""

from __future__ import annotations

from hocket import loras


def test_adapters_are_named_once_each_and_few() -> None:
    names = [f"a{number}" for number in range(20)]
    assert [loras.parsed(text) for text in ("a", "a:-0.5", "a:4")] == [
        ("a", 1.0),
        ("a", -0.5),
        ("a", 4.0),
    ]
    for text in ("", ":1", "a:", "a:4.1", "a:1e1", "a:nan", "a b", "a:1:2", "-a", "a" * 129):
        assert loras.parsed(text) is None
    assert not list(loras.faults(names[:8]))
    assert list(loras.faults(["a", "b:1", "a:2"])) == [(2, "each adapter once")]
    assert list(loras.faults(names)) == [(8, "at most 8 adapters")]

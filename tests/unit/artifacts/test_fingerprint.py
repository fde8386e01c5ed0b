import string
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.artifacts.fingerprint import KEY_LENGTH, differences, file_digest, recipe_key
from qlora_dist.artifacts.leaves import CACHE, folder_digest

names = st.text(string.ascii_lowercase, min_size=1, max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
recipes = st.dictionaries(names, values, max_size=4)


@given(recipes, recipes)
def test_two_recipes_share_a_key_only_if_they_are_equal(left, right):
    same = recipe_key("rows", 1, left) == recipe_key("rows", 1, right)
    assert same == (str(_sorted(left)) == str(_sorted(right)))


def _sorted(value):
    if isinstance(value, dict):
        return {k: _sorted(value[k]) for k in sorted(value)}
    return [_sorted(v) for v in value] if isinstance(value, list) else value


@given(recipes)
def test_order_of_fields_does_not_move_a_key(recipe):
    assert recipe_key("rows", 1, recipe) == recipe_key("rows", 1, dict(reversed(recipe.items())))


def test_stage_version_inputs_and_leaves_each_move_the_key():
    keys = {
        recipe_key("rows", 1, {}),
        recipe_key("shards", 1, {}),
        recipe_key("rows", 2, {}),
        recipe_key("rows", 1, {}, {"splits": "a"}),
        recipe_key("rows", 1, {}, {"shards": "a"}),
        recipe_key("rows", 1, {}, {}, {"files": "a"}),
    }
    assert len(keys) == 6
    assert all(len(key) == KEY_LENGTH for key in keys)


@given(recipes, recipes)
def test_differences_are_empty_exactly_when_recipes_are_equal(left, right):
    assert (differences(left, right) == []) == (left == right)


def test_differences_name_the_field_and_both_values():
    before = {"lora": {"lora_rank": 8}, "train": {"epochs": 1.0}}
    after = {"lora": {"lora_rank": 16}, "train": {"epochs": 1.0}}
    assert differences(before, after) == ["lora.lora_rank: 8 -> 16"]


def test_folder_digest_follows_bytes_and_names_not_times(tmp_path: Path):
    folder, cache = tmp_path / "model", tmp_path / "cache"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"one")
    first = folder_digest(folder, cache)
    (folder / "a.bin").touch()
    assert folder_digest(folder, cache) == first
    (folder / "a.bin").rename(folder / "b.bin")
    assert folder_digest(folder, cache) != first
    (folder / "b.bin").rename(folder / "a.bin")
    (folder / "a.bin").write_bytes(b"two")
    assert folder_digest(folder, cache) != first


def test_folder_digest_reads_an_unchanged_file_once(tmp_path: Path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"one")
    folder_digest(folder, tmp_path)
    monkeypatch.setattr("qlora_dist.artifacts.leaves.file_digest", None)
    folder_digest(folder, tmp_path)
    assert (tmp_path / CACHE).exists()


def test_a_torn_digest_cache_is_made_anew(tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"one")
    first = folder_digest(folder, tmp_path)
    (tmp_path / CACHE).write_text("{torn")
    assert folder_digest(folder, tmp_path) == first


def test_file_digest_is_sha256(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a").startswith("ba7816bf8f01cfea")

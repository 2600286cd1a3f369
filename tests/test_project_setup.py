"""What the Makefile's set-up does with pip's configuration, and that the example settings are settings."""

import importlib.util

import pytest

from .project_rules import ROOT

spec = importlib.util.spec_from_file_location("pip_settings", ROOT / "deploy" / "pip_settings.py")
assert spec
assert spec.loader
pip_settings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pip_settings)

LISTING = """\
:env:.find-links='/from/environment'
:env:.no-input='1'
global.extra-index-url='https://one.example/simple\\nhttps://two.example/simple'
global.find-links='/from/file /and/another'
install.index-url="https://it's.example/simple"
global.index-url='https://shadowed.example/simple'
"""


@pytest.fixture(autouse=True)
def _no_settings_of_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, _ in pip_settings.SEPARATORS.values():
        monkeypatch.delenv(variable, raising=False)


def test_uv_is_told_what_pip_is_configured_with() -> None:
    assert set(pip_settings.exports(LISTING)) == {
        "export UV_INDEX_STRATEGY=unsafe-best-match",
        "export UV_DEFAULT_INDEX='https://it'\"'\"'s.example/simple'",
        "export UV_INDEX='https://one.example/simple https://two.example/simple'",
        "export UV_FIND_LINKS=/from/environment",
    }


def test_several_folders_are_joined_as_uv_wants_them() -> None:
    assert "export UV_FIND_LINKS=/a,/b" in pip_settings.exports("global.find-links='/a\\n/b'")


def test_what_uv_is_told_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_FIND_LINKS", "/mine")
    assert not any("FIND_LINKS" in line for line in pip_settings.exports(LISTING))

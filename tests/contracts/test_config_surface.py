"""The keys of the config are a contract: taking one away, or renaming it, breaks the files of every user."""

from pathlib import Path

from pretrain.config.reference import reference
from pretrain.config.run_config import SECTIONS, VARIANTS, RunConfig

ROOT = Path(__file__).parents[2]


def keys() -> list[str]:
    found = []
    for section, cls in SECTIONS.items():
        if section in VARIANTS:
            _, _, choices, class_of = VARIANTS[section]
            for choice in choices:
                found += [f"{section}({choice}).{key}" for key in class_of(choice).model_fields]
        else:
            found += [f"{section}.{key}" for key in cls.model_fields]
    return found


def test_keys_are_those_of_the_list():
    """A new key gets its line in config_keys.txt; a line that goes needs a word to the users."""
    assert sorted(keys()) == sorted((Path(__file__).parent / "config_keys.txt").read_text().split())


def test_sections_are_the_fields_of_a_run():
    assert list(SECTIONS) == list(RunConfig.model_fields)


def test_every_field_says_what_it_means():
    classes = [cls for name, cls in SECTIONS.items() if name not in VARIANTS]
    classes += [class_of(choice) for _, _, choices, class_of in VARIANTS.values() for choice in choices]
    silent = [f"{cls.__name__}.{key}" for cls in classes for key, field in cls.model_fields.items()
              if not field.description]
    assert silent == []


def test_reference_is_fresh():
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == reference(), "run `make docs`"

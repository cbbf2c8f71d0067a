"""The configurations are read as TRL's own are, from a command line or from YAML."""

from __future__ import annotations

import pytest
from trl import TrlParser

from fastpref.integrations.trl import DRDOConfig, OracleConfig, TVKDConfig


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (
            TVKDConfig,
            {"alpha": 0.7, "form": "next_value", "precompute_shaping": True},
        ),
        (DRDOConfig, {"alpha": 0.3, "gamma": 1.5, "length_normalize": True}),
        (OracleConfig, {"sft_weight": 0.2}),
    ],
)
def test_yaml_and_command_line(tmp_path, config, settings):
    file = tmp_path / "recipe.yaml"
    lines = [f"{name}: {str(value).lower()}" for name, value in settings.items()]
    file.write_text("\n".join(["output_dir: somewhere", "bf16: false", *lines]), "utf-8")
    (args,) = TrlParser(config).parse_args_and_config(
        ["--config", str(file), "--learning_rate", "3e-6"]
    )
    assert args.learning_rate == 3e-6 and args.output_dir == "somewhere"
    for name, value in settings.items():
        assert getattr(args, name) == value


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit):
        TrlParser(TVKDConfig).parse_args_and_config(["--help"])
    assert "--precompute_shaping" in capsys.readouterr().out

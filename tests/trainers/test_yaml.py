"""The configurations are read as TRL's own are, from a command line or from YAML."""

from __future__ import annotations

import pytest
from trl import TrlParser

from fastpref.integrations.trl import DRDOConfig, OracleConfig, PreferenceConfig, TVKDConfig


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (
            TVKDConfig,
            {"alpha": 0.7, "form": "next_value", "precompute_shaping": True},
        ),
        (DRDOConfig, {"alpha": 0.3, "gamma": 1.5, "length_normalize": True}),
        (OracleConfig, {"sft_weight": 0.2}),
        (PreferenceConfig, {"method": "gkd", "divergence": "skew_kl", "max_new_tokens": 32}),
        (PreferenceConfig, {"method": "adpa", "advantage_clip": [0.0, 1.0]}),
        (PreferenceConfig, {"method": ["tvkd", "sft"], "method_weights": [1.0, 0.1]}),
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


def test_several_methods_on_a_command_line():
    line = "--output_dir x --bf16 false --method dpo sft --method_weights 1 0.1 --beta 0.2"
    (args,) = TrlParser(PreferenceConfig).parse_args_and_config(line.split())
    assert (args.methods, args.beta) == ({"dpo": 1.0, "sft": 0.1}, 0.2)
    one = "--output_dir x --bf16 false --method adpa --advantage_clip -1 1"
    (args,) = TrlParser(PreferenceConfig).parse_args_and_config(one.split())
    assert args.method == "adpa" and args.advantage_clip == [-1, 1]


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit):
        TrlParser(TVKDConfig).parse_args_and_config(["--help"])
    assert "--precompute_shaping" in capsys.readouterr().out

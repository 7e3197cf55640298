import json

import pytest
from transformers import AutoConfig, PreTrainedConfig

from modeling_evmamba import VARIANTS, EfficientVMambaConfig


# Keys of the configuration in addition to those of transformers. `@strict` accepts unknown keywords, so a misspelled
# field in the code would go unnoticed without this list.
OWN_KEYS = {
    *("num_channels", "image_size", "patch_size", "hidden_sizes", "depths", "block_types", "stage_names"),
    *("state_size", "expand", "time_step_rank", "time_step_min", "time_step_max", "time_step_floor"),
    *("conv_kernel", "use_conv_bias", "use_bias", "expand_ratio", "squeeze_expansion_ratio", "drop_path_rate"),
    *("layer_norm_eps", "batch_norm_eps", "initializer_range", "out_features", "out_indices"),
}


def test_saved_keys(tmp_path):
    EfficientVMambaConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    inherited = set(PreTrainedConfig().to_dict()) | {"id2label", "label2id", "problem_type"}
    assert set(saved) - inherited == OWN_KEYS


def test_round_trip_through_the_auto_class(tmp_path):
    config = EfficientVMambaConfig(**VARIANTS["base"], out_features=["stage2", "stage4"], num_labels=7)
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(reloaded, EfficientVMambaConfig)
    assert reloaded.to_diff_dict() | {"_name_or_path": ""} == config.to_diff_dict() | {"_name_or_path": ""}


def test_stage_names_follow_the_number_of_stages():
    config = EfficientVMambaConfig(hidden_sizes=[8, 16], depths=[1, 1], block_types=["evss", "evss"])
    assert config.num_stages == 2
    assert config.stage_names == ["stem", "stage1", "stage2"]


def test_hidden_size_follows_from_the_hidden_sizes(tmp_path):
    config = EfficientVMambaConfig(**VARIANTS["base"], hidden_size=768, num_stages=4, num_hidden_layers=4)
    assert config.hidden_size == 768
    assert "hidden_size" not in config.to_dict()
    config.hidden_sizes = [8, 16, 32, 64]
    assert config.hidden_size == 64
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 64
    assert AutoConfig.from_pretrained(tmp_path, hidden_sizes=[8, 16, 32, 48]).hidden_size == 48


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_channels": 0}, "`num_channels` must be a positive integer"),
        ({"patch_size": -4}, "`patch_size` must be a positive integer"),
        ({"patch_size": 4.5}, "patch_size"),
        ({"image_size": 0}, "`image_size` must be one positive integer or two"),
        ({"image_size": [224, -1]}, "`image_size` must be one positive integer or two"),
        ({"state_size": 0}, "`state_size` must be a positive integer"),
        ({"expand": 0}, "`expand` must be a positive integer"),
        ({"conv_kernel": 4}, "`conv_kernel` must be odd"),
        ({"hidden_sizes": [8, 16, 32]}, "`hidden_sizes`, `depths` and `block_types` must have one entry per stage"),
        ({"hidden_sizes": [], "depths": [], "block_types": []}, "one entry per stage"),
        ({"hidden_sizes": [8, 16, 32, 0]}, "`hidden_sizes` must hold positive integers"),
        ({"hidden_sizes": "48,96"}, "hidden_sizes"),
        ({"depths": [1, 1, -1, 1]}, "`depths` must hold positive integers"),
        ({"block_types": ["evss", "evss", "mlp", "evss"]}, "`block_types` accepts 'evss' and 'inverted_residual'"),
        ({"time_step_rank": 0}, "`time_step_rank` must be 'auto' or a positive integer"),
        ({"time_step_rank": "full"}, "`time_step_rank` must be 'auto' or a positive integer"),
        ({"time_step_min": 0.2}, "0 < time_step_min <= time_step_max"),
        ({"time_step_floor": 0.0}, "`time_step_floor` must be positive"),
        ({"squeeze_expansion_ratio": 0.0}, "`squeeze_expansion_ratio` must lie in"),
        ({"drop_path_rate": 1.0}, "`drop_path_rate` must lie in"),
        ({"drop_path_rate": -0.1}, "`drop_path_rate` must lie in"),
        ({"layer_norm_eps": 0.0}, "`layer_norm_eps` must be positive"),
        ({"initializer_range": -1.0}, "`initializer_range` must be positive"),
        ({"hidden_size": 192}, "`hidden_size` follows from `hidden_sizes` and is 384, got 192: leave it out"),
        ({"hidden_sizes": [], "hidden_size": 192}, "`hidden_size` follows from `hidden_sizes`"),
        ({"num_stages": 3}, "`num_stages` follows from `depths` and is 4, got 3: leave it out"),
        ({"num_hidden_layers": 10}, "`num_hidden_layers` follows from `depths` and is 4, got 10: leave it out"),
        ({"out_features": ["stage9"]}, "out_features must be a subset of stage_names"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_at_construction(fields, message):
    with pytest.raises(Exception, match=message):
        EfficientVMambaConfig(**fields)

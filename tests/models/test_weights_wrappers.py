"""The network in whatever training scripts write around it, and which of two is taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from setriton import create_model, load_weights
from setriton.cli import main
from setriton.models.saved import load

State = dict[str, Tensor]


def fresh() -> Any:
    return create_model("se_resnet20")


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(1)
    return fresh().state_dict()


@pytest.fixture(scope="module")
def averaged(state: State) -> State:
    return {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}


def assert_loads(content: Any, want: State, tmp_path: Path, **options: Any) -> str:
    """From memory and from files in both formats of torch.save; the report."""
    path = tmp_path / "a.pth"
    for zipped in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        model = fresh()
        load_weights(model, path, **options)
        assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())
    model = fresh()
    report = load_weights(model, content, **options)
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())
    return str(report)


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def with_inner(name: str, state: State) -> State:
    """Keys as where blocks and their layers are wrapped one by one."""
    return {
        ".".join(p if p in ("weight", "bias") else f"{p}.{name}" for p in k.split(".")): v for k, v in state.items()
    }


PREFIXES = (
    *("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.module.", "module.module._orig_mod."),
    *("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.", "_orig_mod._fsdp_wrapped_module."),
    *(
        "model.",
        "net.",
        "network.",
        "model.net.",
        "model._orig_mod.",
        "module.model.",
        "model.module.net.",
        "encoder_q.",
    ),
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_in_any_order_and_number(prefix: str, state: State, tmp_path: Path) -> None:
    assert_loads(prefixed(prefix, state), state, tmp_path)
    path = tmp_path / "a.safetensors"
    save_file(prefixed(prefix, state), path)
    model = fresh()
    load_weights(model, path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"])
def test_wrappers_inside_of_keys(name: str, state: State, tmp_path: Path) -> None:
    assert_loads(with_inner(name, state), state, tmp_path)
    assert_loads(prefixed("module.", with_inner(name, state)), state, tmp_path)


def test_two_keys_that_become_one_are_refused(state: State) -> None:
    with pytest.raises(ValueError, match=r"without prefixes of wrappers, conv1\.weight is twice"):
        load_weights(fresh(), state | prefixed("module.", state))


def test_tensors_beside_the_state_dict(state: State, tmp_path: Path) -> None:
    adam = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    assert_loads({"state_dict": state, "best_acc1": torch.tensor(3.0), "optimizer": adam}, state, tmp_path)
    assert_loads({"model": prefixed("module.", state), "step": torch.tensor(3), "args": None}, state, tmp_path)
    assert_loads({"module": state, "optimizer": adam}, state, tmp_path)
    lightning = {"state_dict": prefixed("model.", state) | {"criterion.weight": torch.ones(3)}, "epoch": 3}
    assert "left out is what is no part of the network: state_dict.criterion.weight" in assert_loads(
        lightning, state, tmp_path
    )
    report = assert_loads(AveragedModel(fresh()).state_dict() | prefixed("module.", state), state, tmp_path)
    assert "n_averaged" in report


@pytest.mark.parametrize(
    ("raw", "ema"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema"), ("state_dict", "ema_state_dict")],
)
def test_of_two_the_average_is_taken_and_the_caller_may_choose(
    raw: str, ema: str, state: State, averaged: State, tmp_path: Path
) -> None:
    both = {raw: prefixed("module.", state), ema: {"module": averaged}, "epoch": 3}
    report = assert_loads(both, averaged, tmp_path)
    assert f"taken are the averaged (EMA) weights {ema}; left are {raw}" in report
    report = assert_loads(both, state, tmp_path, use_ema=False)
    assert f"taken are the weights {raw}; left are {ema}" in report
    alone = assert_loads({ema: averaged}, averaged, tmp_path)
    assert f"averaged (EMA) weights {ema}; there are no others" in alone
    with pytest.raises(
        ValueError, match=f"use_ema must not be False for weights: it has averaged weights alone, {ema}"
    ):
        load_weights(fresh(), {ema: averaged}, use_ema=False)
    # timm writes None where there is no average.
    assert_loads({raw: state, ema: None}, state, tmp_path)


def test_what_timm_takes(state: State, averaged: State, tmp_path: Path) -> None:
    from timm.models import load_state_dict

    path = tmp_path / "a.pth"
    for content in ({"state_dict": state, "state_dict_ema": averaged}, {"model": averaged, "state_dict": state}):
        torch.save(content, path)
        for use_ema in (True, False):
            want, model = load_state_dict(str(path), use_ema=use_ema), fresh()
            load_weights(model, path, use_ema=use_ema)
            assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())


def test_create_model_and_convert_take_what_the_caller_says(
    state: State, averaged: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "a.pth", tmp_path / "a.safetensors"
    torch.save({"state_dict": state, "state_dict_ema": averaged}, path)
    model: Any = create_model("se_resnet20", weights=path, use_ema=False)
    assert torch.equal(model.fc.weight, state["fc.weight"])
    for flags, want in (([], averaged), (["--no-use-ema"], state)):
        assert main(["convert", str(path), "--out", str(out), "--force", "--model", "se_resnet20", *flags]) == 0
        assert torch.equal(load(out)[0]["fc.weight"], want["fc.weight"])
        assert "taken are the" in capsys.readouterr().out


def test_two_networks_are_refused(state: State, averaged: State) -> None:
    with pytest.raises(ValueError, match="must hold one network; it has those of student, teacher"):
        load_weights(fresh(), {"student": state, "teacher": averaged})


def nested(depth: int, inner: Any) -> Any:
    for _ in range(depth):
        inner = {"a": inner}
    return inner


def containing_itself(state: State) -> Any:
    content: dict[str, Any] = {"state_dict": state}
    content["self"] = content
    return content


def doubled(levels: int) -> Any:
    """2 ** levels paths to one dictionary."""
    inner: dict[str, Any] = {"epoch": 1}
    for _ in range(levels):
        inner = {"a": inner, "b": inner}
    return inner


def test_dictionaries_without_end(state: State, tmp_path: Path) -> None:
    assert_loads(containing_itself(state), state, tmp_path)
    assert_loads({"state_dict": state, "other": doubled(60)}, state, tmp_path)
    assert_loads(nested(20, state), state, tmp_path)
    empty: dict[str, Any] = {}
    empty["self"] = empty
    contents: tuple[Callable[[], Any], ...] = (lambda: empty, lambda: doubled(60), lambda: nested(300, state))
    for content in contents:
        with pytest.raises(ValueError, match="it has no tensors"):
            load_weights(fresh(), content())


def test_mmengine_saves_the_average_as_the_state_dict(state: State, averaged: State, tmp_path: Path) -> None:
    trained = {"steps": torch.tensor(7)} | prefixed("module.", state)
    content = {"state_dict": averaged, "ema_state_dict": trained, "meta": {"epoch": 3}}
    report = assert_loads(content, averaged, tmp_path)
    assert "taken are the averaged (EMA) weights state_dict; left are ema_state_dict" in report
    assert "taken are the weights ema_state_dict" in assert_loads(content, state, tmp_path, use_ema=False)


@pytest.mark.parametrize(
    "name", ["emaModel", "modelEma", "EMAWeights", "model_EMA", "ema2", "net.ema", "averaged_model"]
)
def test_names_of_averages(name: str, state: State, averaged: State, tmp_path: Path) -> None:
    assert_loads({"state_dict": state, name: averaged}, averaged, tmp_path)


@pytest.mark.parametrize("name", ["emanet", "schema", "cinema_model", "SCHEMA"])
def test_names_that_only_contain_it(name: str, state: State, averaged: State, tmp_path: Path) -> None:
    report = assert_loads({"state_dict": state, name: averaged}, state, tmp_path)
    assert f"taken are the weights state_dict; left are {name}" in report


@pytest.mark.parametrize(
    "average", [{"shadow_params": [torch.ones(3)]}, {"decay": 0.9, "shadow": {"a": torch.ones(3)}}]
)
def test_averages_of_an_unknown_form_are_told(average: Any, state: State, tmp_path: Path) -> None:
    report = assert_loads({"model": state, "ema": average, "ema_decay": 0.9}, state, tmp_path)
    assert "left are averages of an unknown form: ema" in report
    assert "unknown form" not in assert_loads({"model": state, "ema": {}}, state, tmp_path)


def test_one_name_for_two_networks_is_refused(state: State, averaged: State) -> None:
    with pytest.raises(ValueError, match="must hold one network; it has those of model, model"):
        load_weights(fresh(), {"model": {"module": state}, "module": {"model": averaged}})

"""Invariant: no name, however it is written or linked, opens a folder outside of the ones that the host keeps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from balanced_offload.nodes.pipeline_files import PipelineNameError, find_pipeline, pipeline_names, stamp


def _pipeline(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    """Two folders of a host, with pipelines one and two levels down, and what is none."""
    first, second = tmp_path / "models" / "diffusers", tmp_path / "elsewhere" / "pipes"
    _pipeline(first / "sdxl-base")
    _pipeline(first / "stabilityai" / "sd35")
    _pipeline(first / "a" / "b" / "too-deep")
    _pipeline(first / "sdxl-base" / "inner")  # a part of a pipeline
    (first / "no-index").mkdir()
    (first / "file.txt").write_text("")
    _pipeline(second / "Flux.1-dev")
    _pipeline(second / "sdxl-base")
    return [first, second]


def test_lists_pipelines_one_and_two_levels_down(roots: list[Path]) -> None:
    assert pipeline_names(roots) == ["Flux.1-dev", "sdxl-base", "stabilityai/sd35"]


def test_every_listed_name_is_found_in_the_first_folder_that_has_it(roots: list[Path]) -> None:
    assert find_pipeline("sdxl-base", roots) == roots[0] / "sdxl-base"
    assert find_pipeline("Flux.1-dev", roots) == roots[1] / "Flux.1-dev"
    assert find_pipeline("stabilityai/sd35", roots) == roots[0] / "stabilityai" / "sd35"


def test_missing_folders_are_no_error(tmp_path: Path) -> None:
    assert pipeline_names([]) == []
    assert pipeline_names([tmp_path / "none"]) == []


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "sdxl-base/../../../outside",
        "..",
        ".",
        "",
        " sdxl-base",
        "/etc",
        "//server/share/model",
        "~/models",
        "C:/models/sdxl",
        "C:sdxl",
        "\\\\server\\share",
        "sdxl-base\\..\\..\\outside",
        "sdxl-base/",
        "a//b",
        "sdxl\0base",
    ],
)
def test_what_is_no_name_is_refused_and_told_where_to_put_it(name: str, roots: list[Path]) -> None:
    _pipeline(roots[0].parents[1] / "outside")
    with pytest.raises(PipelineNameError, match="refused") as caught:
        find_pipeline(name, roots)
    assert str(roots[0]) in str(caught.value) and "extra_model_paths.yaml" in str(caught.value)


def test_an_absolute_path_is_refused_even_to_an_allowed_folder(roots: list[Path]) -> None:
    with pytest.raises(PipelineNameError, match="refused"):
        find_pipeline(str(roots[0] / "sdxl-base"), roots)


def test_deeper_than_the_list_is_refused(roots: list[Path]) -> None:
    with pytest.raises(PipelineNameError, match="3 levels deep, allowed are 2"):
        find_pipeline("a/b/too-deep", roots)


@pytest.mark.parametrize("below", ["linked", "group/linked"])
def test_a_link_that_leads_outside_is_refused_and_not_listed(below: str, roots: list[Path], tmp_path: Path) -> None:
    outside = _pipeline(tmp_path / "outside" / "secret")
    link = roots[0] / below
    link.parent.mkdir(exist_ok=True)
    try:
        link.symlink_to(outside, target_is_directory=True)
    except OSError:
        pytest.skip("this system lets us make no symbolic links")
    assert below not in pipeline_names(roots)
    with pytest.raises(PipelineNameError, match="a link leads it outside"):
        find_pipeline(below, roots)


def test_a_linked_parent_that_leads_outside_is_refused(roots: list[Path], tmp_path: Path) -> None:
    _pipeline(tmp_path / "outside" / "secret")
    try:
        (roots[0] / "group").symlink_to(tmp_path / "outside", target_is_directory=True)
    except OSError:
        pytest.skip("this system lets us make no symbolic links")
    assert "group/secret" not in pipeline_names(roots)
    with pytest.raises(PipelineNameError, match="a link leads it outside"):
        find_pipeline("group/secret", roots)


def test_a_link_into_another_allowed_folder_is_fine(roots: list[Path]) -> None:
    try:
        (roots[0] / "flux").symlink_to(roots[1] / "Flux.1-dev", target_is_directory=True)
    except OSError:
        pytest.skip("this system lets us make no symbolic links")
    assert "flux" in pipeline_names(roots)
    assert find_pipeline("flux", roots) == roots[0] / "flux"


def test_a_linked_folder_of_the_host_is_its_own(roots: list[Path], tmp_path: Path) -> None:
    try:
        (tmp_path / "link").symlink_to(roots[0], target_is_directory=True)
    except OSError:
        pytest.skip("this system lets us make no symbolic links")
    assert pipeline_names([tmp_path / "link"]) == ["sdxl-base", "stabilityai/sd35"]
    assert find_pipeline("sdxl-base", [tmp_path / "link"]).samefile(roots[0] / "sdxl-base")


def test_a_link_to_the_allowed_folder_itself_is_no_pipeline(roots: list[Path]) -> None:
    (roots[0] / "model_index.json").write_text("{}")
    try:
        (roots[0] / "self").symlink_to(roots[0], target_is_directory=True)
    except OSError:
        pytest.skip("this system lets us make no symbolic links")
    assert "self" not in pipeline_names(roots)


def test_a_missing_name_lists_near_ones(roots: list[Path]) -> None:
    with pytest.raises(PipelineNameError) as caught:
        find_pipeline("SDXL_base", roots)
    assert "Near it are sdxl-base" in str(caught.value) and "Flux" not in str(caught.value)
    with pytest.raises(PipelineNameError, match=r"Allowed are Flux\.1-dev, sdxl-base, stabilityai/sd35"):
        find_pipeline("zzzzqqqq", roots)
    with pytest.raises(PipelineNameError, match=r"a folder without model_index\.json"):
        find_pipeline("no-index", roots)


def test_no_pipeline_at_all_says_where_to_put_one(tmp_path: Path) -> None:
    with pytest.raises(PipelineNameError, match=r"no pipeline below .*pipes.*save_pretrained"):
        find_pipeline("sdxl", [tmp_path / "pipes"])
    with pytest.raises(PipelineNameError, match="the host has no `diffusers` folder"):
        find_pipeline("sdxl", [])


def test_the_stamp_tells_when_a_file_was_touched(roots: list[Path]) -> None:
    folder = roots[0] / "sdxl-base"
    before = stamp(folder)
    assert before == stamp(folder) and len(before) == 2 + 1  # its own two files, and the inner pipeline's index
    os.utime(folder / "unet" / "config.json", ns=(1, 1))
    touched = stamp(folder)
    assert touched != before
    (folder / "unet" / "weights.safetensors").write_bytes(b"1234")
    assert stamp(folder) != touched

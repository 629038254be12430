"""`stego demo`; test_readme runs it as printed."""

import pytest


def test_a_demo_stays_out_of_the_way(here, monkeypatch):
    from cli_parts.demo import check_demo_folder, draw_scenes

    monkeypatch.setattr("cli_parts.demo.SCENES", {"train": 1, "val": 1})
    draw_scenes(here / "demo")
    check_demo_folder(here / "demo")  # a second one may go there
    check_demo_folder(here / "new")
    (here / "demo/images/train/holiday.png").touch()
    with pytest.raises(ValueError, match="holiday.png"):
        check_demo_folder(here / "demo")

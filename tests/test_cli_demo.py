"""`stego demo`; test_readme runs it as printed."""

import re

import pytest


def test_a_demo_stays_out_of_the_way(here, monkeypatch):
    from cli_parts.demo import check_demo_folder, draw_scenes

    monkeypatch.setattr("cli_parts.demo.SCENES", {"train": 1, "val": 1})
    draw_scenes(here / "demo")
    (here / "demo/images/.DS_Store").touch()  # of a Mac on which somebody looked into the folder
    check_demo_folder(here / "demo")  # a second one may go there
    check_demo_folder(here / "new")
    (here / "demo/images/train/holiday.png").touch()
    with pytest.raises(ValueError, match="holiday.png"):
        check_demo_folder(here / "demo")


def test_each_stage_is_announced_with_about_how_long_it_takes(caplog):
    import logging

    from cli_parts.demo import STAGES, say_stage

    with caplog.at_level(logging.INFO, "stego"):
        for stage in STAGES:
            say_stage(stage, 0.1)
    said = [record.getMessage() for record in caplog.records]
    assert [text[:4] for text in said] == ["1/4 ", "2/4 ", "3/4 ", "4/4 "]
    assert all(re.search(r", about \d+ s with tiny\.$", text) for text in said)

"""The page of ``grass-compile explain``, in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch

from grass_compile import cli
from grass_compile.cli.explain import page
from grass_compile.errors import ConfigError
from grass_compile.planner.close_up import CloseUp, close_up
from grass_compile.planner.request import Request
from grass_compile.report import Report, Row

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"

WATCH = '<script>window.errors = []; addEventListener("error", event => errors.push(event.message));</script>'
TRY = """<script>{
const names = () => [...document.querySelectorAll("tbody tr:not([hidden]) td:first-child")].map(cell => cell.textContent.trim());
const found = {all: names()}, heads = document.querySelectorAll("th button"), filter = document.getElementById("filter");
heads[1].click(); found.by_shape = names();
heads[1].click(); found.by_shape_down = names();
filter.value = "MLP"; filter.dispatchEvent(new Event("input")); found.filtered = names();
found.count = document.getElementById("count").textContent;
filter.value = ""; document.getElementById("dense").click(); found.dense = names();
found.width = innerWidth; found.overflow = document.documentElement.scrollWidth - innerWidth;
found.errors = errors;
top.document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
}</script>"""

REPORT = Report(
    (
        Row("embed.weight", (1000, 64), torch.float32, False, None, None, "its name matches <exclude> & more"),
        Row("attention.weight", (64, 64), torch.float32, True, "columns", 8, "asked for", 1, 100, 4096, "grass"),
        Row(
            "mlp.a_name_that_is_long_enough_to_be_broken.weight",
            (256, 64),
            torch.float32,
            True,
            "rows",
            8,
            "less",
            0,
            100,
            9,
            "grass",
        ),
        Row("norm.weight", (64,), torch.float32, False, None, None, "it has 1 dimension"),
    )
)


SEEN = CloseUp("mlp.weight", "before" * 200, "after", "step", "kernel<float>();" * 100)


def in_browser(html: str, width: int, folder: Path) -> dict[str, Any]:
    """What the page does when somebody sorts and filters it, in a frame of a width that a window may not have."""
    path = folder / "page.html"
    tried = escape(html.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{TRY}</body>"))
    path.write_text(f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{tried}"></iframe>', encoding="utf-8")
    command = [str(BROWSER), *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium, to open a page in")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_page_sorts_and_filters(width: int, tmp_path: Path) -> None:
    found = in_browser(page(REPORT, "A model", "some settings", SEEN), width, tmp_path)
    names = [row.name for row in REPORT]
    by_size = sorted(names, key=lambda name: REPORT[name].dense_elements)
    assert found["width"] == width and found["errors"] == [] and found["overflow"] <= 0
    assert found["all"] == names
    assert found["by_shape"] == by_size and found["by_shape_down"] == by_size[::-1]
    assert found["filtered"] == [names[2]] and found["count"] == "1 of 4 parameters"
    assert set(found["dense"]) == {names[0], names[3]}


def test_a_page_needs_nothing_beside_it_and_escapes_what_it_shows() -> None:
    html = page(REPORT, "A model", "some settings")
    assert "&lt;exclude&gt; &amp; more" in html and "<exclude>" not in html
    assert not re.search(r"(src|href)=|@import|url\(", html)
    assert "2 of 4 parameters projected" in html


def small_llama(folder: Path) -> str:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    return str(folder)


@pytest.mark.inductor
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.exhaustive)])
def test_one_weight_close_up(device: str, tmp_path: Path) -> None:
    """Its rank is 8 of 64: nothing of the size of its gradient is there after the rewrite; and one kernel is the whole step."""
    pytest.importorskip("transformers", reason="builds the model")
    name = "model.layers.1.mlp.up_proj.weight"
    request = Request(small_llama(tmp_path), 1, 32, device=device, keywords=(("axis", "columns"), ("rank", 8)))
    seen = close_up(request, name)
    assert len(seen.before.splitlines()) == 1 and "bfloat16[128, 64] = aten.mm(" in seen.before
    after = seen.after.splitlines()
    product = "[8, 128] = aten.mm(" if device == "cpu" else "[128, 8] = aten.mm("
    assert "bfloat16[32, 8] = grass_compile.gather(" in after[0] and product in seen.after
    assert "[128, 64]" not in seen.after and "float32[128, 8] = grass_compile.anchor(" in after[-1]
    assert len(seen.step.splitlines()) == 1 and "grass_compile.step_(" in seen.step
    kernel = "at::BFloat16*" if device == "cpu" else "@triton.jit"
    assert kernel in seen.code
    for wrong, says in (("model.norm.weight", "stays dense"), ("model.layers.1.mlp", "has no parameter")):
        with pytest.raises(ConfigError, match=says):
            close_up(request, wrong)
    html = page(REPORT, "A model", "some settings", seen)
    assert f"{name}: its gradient" in html and "<details" in html and kernel in html


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="builds the model")
    arguments = ("explain", small_llama(tmp_path), "--rank", "8", "--seq", "32", "--set", "axis=auto")
    assert cli.main(arguments) == 0
    assert "14 of 21 parameters projected" in capsys.readouterr().out
    assert cli.main((*arguments, "--html", str(tmp_path / "page.html"))) == 0
    assert "model.layers.0.mlp.up_proj.weight" in (tmp_path / "page.html").read_text()
    assert cli.main((*arguments, "--html", str(tmp_path / "none" / "page.html"))) == 2
    assert cli.main(("explain", str(tmp_path), "--rank", "8", "--optimizer", "AdamW", "--set", "axes=rows")) == 2
    assert "Traceback" not in capsys.readouterr().err

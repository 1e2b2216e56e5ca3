"""Size of a report of many cells, how long it takes to write, and whether its map stalls in a browser.

    python benchmarks/report.py annotated.h5ad --cells 100000

Cells of an annotated file are repeated, each copy with half of its counts kept at random (binomial thinning), until
there are enough. The map is the UMAP of the file's own cells, each copy moved a little: ``--umap`` makes one of all
cells, which is what a user waits for. Times in the browser are from the event to the frame after it, the median of
seven, in Chromium without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from evercell.reporting import write_report
from evercell.reporting.umap import umap

TIMED = """async ([kind, value]) => {
    const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    const canvas = document.getElementById("cells"), box = canvas.getBoundingClientRect();
    const pointer = (name, x, y) => canvas.dispatchEvent(new PointerEvent(name, {
        clientX: box.left + x * box.width, clientY: box.top + y * box.height, pointerId: 1, bubbles: true }));
    await frame();
    const start = performance.now();
    if (kind === "colour") {
        const select = document.getElementById("colour-by");
        select.value = value; select.dispatchEvent(new Event("change"));
    } else if (kind === "gene") {
        const field = document.getElementById("gene");
        field.value = value; field.dispatchEvent(new Event("change"));
    } else if (kind === "hover") pointer("pointermove", value, value);
    else canvas.dispatchEvent(new KeyboardEvent("keydown", { key: value }));
    await frame(); await frame();
    return performance.now() - start;
}"""


def repeated(adata: ad.AnnData, n: int, *, whole: bool) -> ad.AnnData:
    """`n` cells with coordinates in ``obsm["X_map"]``, or without where a UMAP of all of them is to be made."""
    draws = np.random.default_rng(0)
    counts = sp.csr_matrix(adata.X)
    counts.data = np.round(counts.data).astype(np.int64)
    places = np.arange(n) % adata.n_obs
    many = counts[places]
    copies = np.repeat(np.arange(n) >= adata.n_obs, np.diff(many.indptr))
    many.data[copies] = draws.binomial(many.data[copies], 0.5)
    many.eliminate_zeros()
    obs = adata.obs.iloc[places].copy()
    obs.index = [f"{name}-{number}" for number, name in enumerate(obs.index)]
    found = ad.AnnData(many.astype(np.float32), obs, adata.var.copy(), uns=dict(adata.uns))
    space = np.asarray(adata.obsm["X_evercell"], dtype=np.float32)
    if whole:
        found.obsm["X_evercell"] = space[places] + draws.normal(0, 0.1 * space.std(), (n, space.shape[1]))
    else:
        points = umap(space, seed=0)
        found.obsm["X_map"] = points[places] + draws.normal(0, 0.15, (n, 2))
    return found


def in_browser(path: Path) -> dict[str, float]:
    """Milliseconds of what a reader does."""
    import shutil

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        start = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("#cells[data-ready]", timeout=120_000)
        gene = page.get_attribute("#gene-list option", "value")
        found = {"open": 1000 * (time.perf_counter() - start)}

        def median(*actions: list[Any]) -> float:
            return statistics.median(page.evaluate(TIMED, list(action)) for _ in range(7) for action in actions)

        found["an empty frame"] = median(["key", "F9"])
        found["first colour by a gene"] = page.evaluate(TIMED, ["gene", gene])
        found["colour"] = median(["colour", "confidence"], ["colour", "label"], ["gene", gene])
        found["move"] = median(["key", "ArrowLeft"], ["key", "ArrowRight"])
        found["zoom"] = median(["key", "+"], ["key", "-"])
        found["point at a cell"] = median(["hover", 0.4], ["hover", 0.6])
        browser.close()
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("file", type=Path)
    asked.add_argument("--cells", type=int, nargs="+", default=[100_000])
    asked.add_argument("--umap", action="store_true", help="make a UMAP of all cells")
    asked.add_argument("--output", type=Path, help="keep the pages in this folder")
    options = asked.parse_args()
    adata = ad.read_h5ad(options.file)
    with tempfile.TemporaryDirectory() as folder:
        for n in options.cells:
            cells = repeated(adata, n, whole=options.umap)
            start, busy = time.perf_counter(), time.process_time()
            path = (options.output or Path(folder)) / f"report-{n}.html"
            write_report(cells, path, basis=None if options.umap else "X_map", old_labels="evercell")
            seconds, busy = time.perf_counter() - start, time.process_time() - busy
            print(
                f"{n:,} cells: {path.stat().st_size / 1e6:.1f} MB, {seconds:.0f} s ({busy:.0f} s of a core)", flush=True
            )
            found = in_browser(path)
            print(
                "  in the browser, ms: " + ", ".join(f"{name} {value:.0f}" for name, value in found.items()), flush=True
            )


if __name__ == "__main__":
    main()

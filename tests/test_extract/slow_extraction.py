"""Extracts slowly and saves after every batch: ``python -m tests.test_extract.slow_extraction SLIDES STORE``."""

import json
import sys
import time

import numpy as np

import extract.pipeline.stream
from extract.backbones.backbone import Backbone
from extract.pipeline.extraction import run_extraction
from tests.test_extract.small import TILES, tiny_backbone

if __name__ == "__main__":
    extract.pipeline.jobs.SAVE_EVERY_S = 0.0
    embed = Backbone.embed

    def slowly(self: Backbone, tiles: np.ndarray) -> np.ndarray:
        """Embed, and take a break."""
        time.sleep(0.03)
        return embed(self, tiles)

    Backbone.embed = slowly  # type: ignore[method-assign]
    try:
        report = run_extraction(sys.argv[1], sys.argv[2], tiny_backbone(), recipe=TILES, batch_size=4, runtime="torch")
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps({name: report.count(name) for name in ("embedded", "complete", "failed", "elsewhere")}))  # noqa: T201

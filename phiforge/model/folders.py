"""Where the model is: in a folder of its own, in a stage's, or the last one of a run.

`find_model("runs/nano-s0")` gives the folder to load; a Hub name comes back as it is.
"""

from pathlib import Path

MODEL_STAGES = ("dpo-judge", "dpo-pivotal", "sft", "midtrain", "pretrain")  # the last one first


def find_model(model: str | Path) -> str | Path:
    """A model folder as it is, a run folder's last model, anything else unchanged (a Hub name)."""
    folder = Path(model)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return model
    for stage in MODEL_STAGES:
        if (folder / stage / "model" / "config.json").is_file():
            return folder / stage / "model"
    if (folder / "model" / "config.json").is_file():  # a stage's folder
        return folder / "model"
    looked = ", ".join(f"{stage}/model" for stage in MODEL_STAGES)
    raise ValueError(
        f"{folder}: no model here; neither config.json nor any of {looked} exists: give a model "
        f"folder, or finish the run (phiforge status {folder})"
    )

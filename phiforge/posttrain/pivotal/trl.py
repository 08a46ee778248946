"""`PivotalDPOTrainer`: TRL's DPO trainer on token ids, trained exactly as they stand.

`PivotalDPOTrainer(model, args=trl.DPOConfig("out"), processing_class=tokenizer,
train_dataset=pair_dataset("pairs.jsonl")).train()`. Needs `pip install 'phiforge[trl]'`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phiforge.core.records import Pair, read_rows
from phiforge.posttrain.pivotal.exchange import located_pairs, token_ids

try:
    import datasets
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
except ImportError as error:
    raise ImportError(
        f"PivotalDPOTrainer needs TRL 1.10 or later ({error}): pip install 'phiforge[trl]'"
    ) from error

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def pair_dataset(pairs: Iterable[Pair] | str | Path) -> datasets.Dataset:
    """The trainer's columns: of pair records, of a pivotal stage's pairs.jsonl, or of a file that
    `export` wrote as "trl" or "token-ids". Raises ValueError (FILE:LINE) for a bad pair."""
    if isinstance(pairs, str | Path) and _has_columns(pairs):
        rows = []
        for where, row in read_rows(pairs):
            _checked(row, where)
            rows.append({"id": str(row.get("id")), **{name: row[name] for name in COLUMNS}})
    else:
        rows = [
            {"id": pair.id, **vars(token_ids(pair, where))} for where, pair in located_pairs(pairs)
        ]
    if not rows:
        raise ValueError(f"{pairs}: no pair to train on")
    return datasets.Dataset.from_list(rows)


def _has_columns(path: str | Path) -> bool:
    row = next((row for _, row in read_rows(path)), None)
    return isinstance(row, dict) and set(COLUMNS) <= row.keys()


class PivotalDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` for data sets with the columns prompt_ids, chosen_ids and rejected_ids.

    TRL itself takes text: it appends an end token to both sides, encodes prompt and side again, and
    drops or cuts what is longer than `max_length` (1,024 unless set). Here the ids reach the model
    as they are: `args.max_length` counts as None, and what the model cannot take raises ValueError
    (rows without ids, ids beyond its vocabulary, rows beyond its context). All other arguments are
    TRL's. Raises ImportError for a TRL that does not take such columns.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **others: Any,
    ) -> None:
        _check_trl()
        args = DPOConfig("pivotal-dpo") if args is None else copy.copy(args)
        args.max_length = None
        self._longest: dict[str, Any] = {}
        self._highest_id = -1
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **others,
        )
        self._check_model()
        self._check_batch()

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """The data set as it is, its rows checked (a streamed one's as they come)."""
        if not isinstance(dataset, datasets.Dataset):
            return dataset.map(lambda row: _checked(row, "a row of the stream"))
        for number, row in enumerate(dataset.select_columns(list(_columns(dataset)))):
            _checked(row, f"row {number}")
            length = _length(row)
            if not self._longest or length > _length(self._longest):
                self._longest = {"number": number, **row}
            self._highest_id = max(self._highest_id, *(max(row[name]) for name in COLUMNS))
        return dataset

    def _check_model(self) -> None:
        config: Any = self.model.config.get_text_config()  # type: ignore[union-attr]
        rows = getattr(config, "vocab_size", None)
        if rows is not None and self._highest_id >= rows:
            raise ValueError(
                f"the pairs hold token id {self._highest_id}, the model has {rows} tokens: they "
                "are of another model's tokenizer"
            )
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and self._longest and _length(self._longest) > context:
            raise ValueError(
                f"row {self._longest['number']} has {_length(self._longest)} tokens, the model was "
                f"made for {context}; leave out longer pairs (cutting would train something else)"
            )

    def _check_batch(self) -> None:
        """That the longest row passes the collator, and the column filter, as it is."""
        self._set_signature_columns_if_needed()
        if not set(COLUMNS) <= set(self._signature_columns or ()):
            raise ImportError(_unfit(f"it reads the columns {self._signature_columns}"))
        if self._longest:
            row = {name: self._longest[name] for name in COLUMNS}
            found = _collated(self.data_collator, row)
            if found != _expected(row):
                raise ValueError(
                    "the data collator does not hand the token ids to the model as they are; leave "
                    "out data_collator, or give one that neither cuts nor adds tokens"
                )


def _columns(dataset: Any) -> tuple[str, ...]:
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the data set lacks {', '.join(missing)} (it has {', '.join(dataset.column_names)}); "
            "make it with pair_dataset(...), or export pairs as 'trl'"
        )
    return COLUMNS


def _checked(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The row, when its columns hold token ids and its sides differ; else ValueError."""
    for name in COLUMNS:
        ids = row.get(name)
        if not isinstance(ids, list) or not ids:
            raise ValueError(f"{where}: {name} is {ids!r}; it must be a list of token ids")
        if not all(isinstance(index, int) and index >= 0 for index in ids):
            raise ValueError(f"{where}: {name} holds something else than token ids: {ids[:8]}")
    if row["chosen_ids"] == row["rejected_ids"]:
        raise ValueError(f"{where}: chosen_ids and rejected_ids are the same tokens")
    return row


def _length(row: Mapping[str, Any]) -> int:
    """Tokens of the longer of the two sequences."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _expected(row: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(token ids, those that are trained) of both sequences, as they must reach the model."""
    sides = (row["chosen_ids"], row["rejected_ids"])
    return [(row["prompt_ids"] + side, list(side)) for side in sides]


def _collated(collator: Any, row: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """The same of what TRL's collator makes of one row."""
    batch = collator([dict(row)])
    names = ("input_ids", "attention_mask", "completion_mask")
    found = []
    for ids, real, trained in zip(*(batch[name].tolist() for name in names), strict=True):
        kept = [index for index, mask in zip(ids, real, strict=True) if mask]
        found.append((kept, [index for index, mask in zip(ids, trained, strict=True) if mask]))
    return found


def _check_trl() -> None:
    """Ask the installed TRL instead of comparing versions: does it take these columns as they are?

    TRL before 1.x names them otherwise and has no such collator.
    """
    row = {"prompt_ids": [5, 6, 5], "chosen_ids": [7], "rejected_ids": [8]}
    try:
        found = _collated(DataCollatorForPreference(pad_token_id=0), row)
    except (KeyError, TypeError) as error:
        raise ImportError(_unfit(f"its collator fails on them: {error!r}")) from error
    if found != _expected(row):
        raise ImportError(_unfit("its collator changes them"))
    if not hasattr(DPOTrainer, "_prepare_dataset"):
        raise ImportError(_unfit("its trainer has no _prepare_dataset to leave out"))


def _unfit(why: str) -> str:
    return (
        f"TRL {version('trl')} does not take the columns {', '.join(COLUMNS)} ({why}); "
        "PivotalDPOTrainer needs TRL 1.10 or later: pip install 'trl>=1.10,<2'"
    )

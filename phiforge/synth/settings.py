"""What the synthesize stage is asked for: families, shares of answer styles, recall, chats, tests.

`SynthesizeConfig(families={"stories": {"levels": [1], "count": 20000}})`; the defaults suit a model
of a million parameters. Nothing is written.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from phiforge.core.config import StageConfig
from phiforge.synth.procedural import NANO_FAMILIES, family_named

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FamilyPlan(_Block):
    """How much of one family goes into the pretraining documents."""

    levels: list[int] = Field(
        default=[1], min_length=1, description="Levels, used in turn, for every output."
    )
    count: Count = Field(default=20_000, description="Problems in documents.jsonl.")


class RecallPlan(_Block):
    """Key-value recall and copying, short (within the context) and long, and long worksheets."""

    needles: Count = Field(default=0, description="Short documents with one pair, at most 1x.")
    documents: Count = Field(default=2_000, description="Short recall documents, at most 1x.")
    copies: Count = Field(default=500, description="Short copying documents, at most 1x.")
    long_needles: Count = Field(default=0, description="Long documents with one pair.")
    long_documents: Count = Field(default=800, description="Long recall documents.")
    long_copies: Count = Field(default=200, description="Long copying documents.")
    long_worksheets: Count = Field(default=200, description="Long worksheets of all families.")
    longest: float = Field(
        default=4.0, gt=2, description="Longest long document, in pretraining contexts."
    )
    longest_share: Share = Field(
        default=0.5, description="Share of long documents as long as the longest; others from 2x."
    )
    list_share: float = Field(
        default=0.6,
        gt=0,
        lt=1,
        description="Share of a recall document that is its list, on average.",
    )


class DrillPlan(_Block):
    """Lines of single arithmetic facts, as many as fit the context."""

    documents: Count = Field(default=0, description="Drill documents.")
    below: int = Field(default=60, ge=6, description="Every number of a drill is below this.")


class ChatPlan(_Block):
    """What chats.jsonl holds."""

    per_family: Count = Field(default=2_500, description="Problem chats of each family.")
    recall: Count = Field(default=300, description="Recall questions, of any length up to longest.")
    identity: Count = Field(default=100, description="Questions of who the model is.")
    model_name: str = Field(default="phiforge nano", description="The name the model gives itself.")


class SynthesizeConfig(StageConfig):
    """Settings of the synthesize stage."""

    families: dict[str, FamilyPlan] = Field(
        default_factory=lambda: {name: FamilyPlan() for name in NANO_FAMILIES},
        description="Families of problems and how many; see phiforge.synth.procedural.FAMILIES.",
    )
    worked_share: Share = Field(default=0.55, description="Answers with all steps.")
    skipping_share: Share = Field(default=0.0, description="Answers with the first step alone.")
    terse_share: Share = Field(default=0.45, description="Answers without steps.")
    bogus_share: Share = Field(
        default=0.15, description="Share of problem chats whose question is unanswerable."
    )
    bogus_document_share: Share = Field(
        default=0.0, description="The same share in the pretraining documents."
    )
    context: int = Field(default=128, ge=32, description="Pretraining context, in tokens.")
    drills: DrillPlan = DrillPlan()
    recall: RecallPlan = RecallPlan()
    chats: ChatPlan = ChatPlan()
    train_count: Count = Field(
        default=1_000, description="Answerable problems of each family in problems_train.jsonl."
    )
    test_count: Count = Field(
        default=500, description="Answerable problems of each family in problems_test.jsonl."
    )
    train_bogus_count: Count = Field(
        default=0, description="Unanswerable problems of each family in problems_train.jsonl."
    )
    test_bogus_count: Count = Field(
        default=100, description="Unanswerable problems of each family in problems_test.jsonl."
    )

    @model_validator(mode="after")
    def _check(self) -> SynthesizeConfig:
        total = self.worked_share + self.skipping_share + self.terse_share
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"worked_share + skipping_share + terse_share is {total:g}; it must be 1"
            )
        for name, plan in self.families.items():
            family = family_named(name)
            for level in plan.levels:
                if not 1 <= level <= family.levels:
                    raise ValueError(
                        f"families.{name}.levels has {level}; allowed is 1..{family.levels}"
                    )
        if not self.families and self.recall.long_worksheets:
            raise ValueError("recall.long_worksheets needs at least one family in families")
        return self

    @property
    def styles(self) -> dict[str, float]:
        """The shares of the answer styles by name."""
        return {
            "worked": self.worked_share,
            "skipping": self.skipping_share,
            "terse": self.terse_share,
        }

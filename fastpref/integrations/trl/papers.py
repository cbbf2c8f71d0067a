"""The papers that a model card cites."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Paper(NamedTuple):
    """A paper on arXiv."""

    title: str
    authors: str
    year: int
    arxiv: str

    def bibtex(self) -> str:
        """Its entry for a list of references."""
        family_name = self.authors.split(",")[0].lower().replace(" ", "")
        return (
            f"@misc{{{family_name}{self.year},\n"
            f"  title = {{{{{self.title}}}}},\n"
            f"  author = {{{self.authors}}},\n"
            f"  year = {{{self.year}}},\n"
            f"  eprint = {{{self.arxiv}}},\n"
            "  archivePrefix = {arXiv},\n"
            "}"
        )


TVKD = Paper(
    "Preference Distillation via Value based Reinforcement Learning",
    "Kwon, Minchan and Ko, Junwon and Kim, Kangil and Kim, Junmo",
    2025,
    "2509.16965",
)
DRDO = Paper(
    "Simultaneous Reward Distillation and Preference Learning: "
    "Get You a Language Model Who Can Do Both",
    "Nath, Abhijnan and Jung, Changsoo and Seefried, Ethan and Krishnaswamy, Nikhil",
    2024,
    "2410.08458",
)
DPO = Paper(
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    "Rafailov, Rafael and others",
    2023,
    "2305.18290",
)
IPO = Paper(
    "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    "Gheshlaghi Azar, Mohammad and others",
    2023,
    "2310.12036",
)
TDPO = Paper(
    "Token-level Direct Preference Optimization", "Zeng, Yongcheng and others", 2024, "2404.11999"
)
SIMPO = Paper(
    "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    "Meng, Yu and others",
    2024,
    "2405.14734",
)
ORPO = Paper(
    "ORPO: Monolithic Preference Optimization without Reference Model",
    "Hong, Jiwoo and Lee, Noah and Thorne, James",
    2024,
    "2403.07691",
)
CPO = Paper(
    "Contrastive Preference Optimization: "
    "Pushing the Boundaries of LLM Performance in Machine Translation",
    "Xu, Haoran and others",
    2024,
    "2401.08417",
)
WPO = Paper(
    "WPO: Enhancing RLHF with Weighted Preference Optimization",
    "Zhou, Wenxuan and others",
    2024,
    "2406.11827",
)
KTO = Paper(
    "KTO: Model Alignment as Prospect Theoretic Optimization",
    "Ethayarajh, Kawin and others",
    2024,
    "2402.01306",
)
EDPO = Paper(
    "Robust Preference Optimization through Reward Model Distillation",
    "Fisch, Adam and others",
    2024,
    "2405.19316",
)
ADPA = Paper(
    "Advantage-Guided Distillation for Preference Alignment in Small Language Models",
    "Gao, Shiping and others",
    2025,
    "2502.17927",
)
DPKD = Paper(
    "Direct Preference Knowledge Distillation for Large Language Models",
    "Li, Yixing and others",
    2024,
    "2406.19774",
)
KD = Paper(
    "Distilling the Knowledge in a Neural Network",
    "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
    2015,
    "1503.02531",
)
GKD = Paper(
    "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    "Agarwal, Rishabh and others",
    2023,
    "2306.13649",
)
SEQKD = Paper(
    "Sequence-Level Knowledge Distillation",
    "Kim, Yoon and Rush, Alexander M.",
    2016,
    "1606.07947",
)

# By method; fine-tuning on the chosen responses has none.
PAPERS = {
    "tvkd": TVKD,
    "drdo": DRDO,
    "oracle": DRDO,
    "dpo": DPO,
    "ipo": IPO,
    "tdpo": TDPO,
    "simpo": SIMPO,
    "orpo": ORPO,
    "cpo": CPO,
    "wpo": WPO,
    "kto": KTO,
    "edpo": EDPO,
    "adpa": ADPA,
    "dckd": ADPA,
    "dpkd": DPKD,
    "dpkd_token": DPKD,
    "vanilla_kd": KD,
    "gkd": GKD,
    "seqkd": SEQKD,
}


def cited(methods: Iterable[str]) -> dict[str, str]:
    """What TRL's model card says of these methods: the first paper, and references to all."""
    papers = list(dict.fromkeys(PAPERS[method] for method in methods if method in PAPERS))
    if not papers:
        return {}
    citation = "\n".join(paper.bibtex() for paper in papers)
    return {"title": papers[0].title, "id": papers[0].arxiv, "citation": citation}

"""What each criterion needs, known without importing it (torch): `saap.criteria.CRITERIA` holds the functions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """statistics and options are the arguments of the criterion's function; search, compensation and own its 'auto'.

    A statistic is the name of the stage that publishes it, except 'tokens': those of calibrate.
    """

    statistics: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    search: str = "uniform"
    compensation: str = "none"
    own: int = 0
    experts: bool = False


SAAP = Needs(search="uniform_down", experts=True)  # its statistics go through fuse and fluctuation
NEEDS: dict[str, Needs] = {
    "saap_plus": Needs(
        ("fisher", "tokens"),
        ("cuts", "take_heads", "ridge", "protect", "align", "kinds"),
        search="global",
        compensation="least_squares",
        own=206,  # 256 sequences with the 50 that are drawn
        experts=True,
    ),
    "saap_gates": Needs(("fisher", "tokens"), ("ratio", "seed", "protect", "kinds"), search="global"),
    "llm_pruner": Needs(("gradients",), ("variant", "query_heads"), search="uniform_down"),
    "wanda_sp": Needs(("tokens",), ("ratio", "kinds", "protect", "align"), search="uniform_down"),
    "flap": Needs(("activations",), search="global", compensation="bias"),
    "gisp": Needs(("tokens",), ("ratio", "protect", "kinds"), search="global", experts=True),
    "hywia": Needs(("score",), search="uniform_down", experts=True),
    "loraprune": Needs(("tokens",), ("seed",), search="uniform_down"),
    "lorashear": Needs(("tokens",), ("seed",), search="global"),
    "magnitude": Needs(experts=True),
    "reap": Needs(("tokens",), search="global", experts=True),
    "random": Needs((), ("seed",), experts=True),
}


def needs_of(criterion: str) -> Needs:
    """What a criterion needs, by its name in the configuration."""
    return SAAP if criterion == "saap" else NEEDS[criterion]


def wrong_search(criterion: str, search: str, direction: str) -> str | None:
    """Why the plan would not be what a criterion pruned as it ranked, in a line, or None."""
    needs = needs_of(criterion)
    if "ratio" not in needs.options or (search in ("auto", needs.search) and direction == "lowest"):
        return None
    return (
        f"{criterion} prunes as it ranks, the lowest first and by prune.search = '{needs.search}': "
        "leave prune.search and prune.direction as they are"
    )

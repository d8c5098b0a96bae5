"""Texts with a known truth, said in words that training and test rows do not share: what bank customers want, and
whether buyers are content.

No text is anybody's. Who only counts words knows none of the test rows' sentences; who knows what words mean does.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

# What a customer wants -> how it is said in training rows, and how in test rows. {a} is an amount, {d} a day.
WANTED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lost-card": (
        (
            "i lost my card on {d}",
            "my card was stolen",
            "i cannot find my bank card anywhere",
            "someone took my card on {d}",
        ),
        ("my wallet with the debit card is gone since {d}", "i left my credit card in a taxi"),
    ),
    "late-transfer": (
        (
            "my transfer of {a} has not arrived",
            "when will the {a} i sent on {d} get there",
            "the payment is still pending",
        ),
        ("they have not received my {a} yet", "money i wired on {d} is not in their account"),
    ),
    "new-address": (
        ("i moved and need to change my address", "please update where i live", "my street changed on {d}"),
        ("we have a new house, send letters there", "how do i tell you my new home"),
    ),
    "loan": (
        ("i would like to borrow {a}", "can i get a loan for a car", "what rate do you offer for credit of {a}"),
        ("we want a mortgage of {a}", "could you lend me {a} until {d}"),
    ),
    "fee": (
        (
            "why was i charged a fee of {a}",
            "there is a cost on my statement i do not understand",
            "refund the charge of {a}",
        ),
        ("you took {a} from me for nothing", "what is this deduction on my bill from {d}"),
    ),
    "close-account": (
        ("please close my account", "i want to leave your bank by {d}", "cancel my savings account"),
        ("i am switching to another bank, end my contract", "terminate everything i have with you"),
    ),
}
# Branch -> messages, and the two wishes that half of them are about.
OFFICES = {
    "airport": (240, ("lost-card", "fee")),
    "harbour": (180, ("late-transfer", "fee")),
    "suburb": (200, ("loan", "new-address")),
    "university": (160, ("lost-card", "close-account")),
}
BEGIN = ("", "hello, ", "good morning, ", "hi there, ", "please help: ", "urgent! ")
END = ("", " thanks", " can you help me", " please call me back", " this is the second time i ask")
DAYS = ("monday", "tuesday", "friday", "the weekend", "last week")
TEST_SHARE = 0.3


def messages() -> pd.DataFrame:
    """Columns `office`, `message`, `wish` (one of `WANTED`) and `part` ("train" or "test")."""
    rng = np.random.default_rng(20_005)
    rows = []
    for office, (count, often) in OFFICES.items():
        for _ in range(count):
            wish = str(rng.choice(often) if rng.random() < 0.5 else rng.choice(list(WANTED)))
            testing = bool(rng.random() < TEST_SHARE)
            said = str(rng.choice(WANTED[wish][testing]))
            said = said.format(a=f"{int(rng.integers(2, 90)) * 10} euros", d=str(rng.choice(DAYS)))
            message = f"{rng.choice(BEGIN)}{said}{rng.choice(END)}"
            rows.append({"office": office, "message": message, "wish": wish, "part": "test" if testing else "train"})
    return pd.DataFrame(rows)


# Department -> what is bought there, and how many reviews it has.
DEPARTMENTS = {
    "books": (("novel", "cookbook", "travel guide", "biography"), 700),
    "films": (("comedy", "thriller", "documentary", "cartoon"), 600),
    "kitchen": (("kettle", "pan", "mixer", "coffee machine"), 800),
    "phones": (("phone", "charger", "headset", "tablet"), 500),
}
# Whether the buyer is content -> how it is said in training rows, and how in test rows. {i} is what was bought.
SAID: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {
    1: (
        (
            "i love this {i}",
            "an excellent {i}, worth every cent",
            "the best {i} i have ever had",
            "i recommend it to everybody",
            "this {i} made me happy",
            "wonderful from beginning to end",
            "it does all that i hoped for",
        ),
        (
            "five stars for this {i}",
            "my whole family is delighted with the {i}",
            "i would buy this {i} again tomorrow",
            "a real pleasure",
        ),
    ),
    0: (
        (
            "i hate this {i}",
            "a terrible {i}, do not buy it",
            "the worst {i} i have ever had",
            "i want my money back",
            "this {i} made me angry",
            "boring and useless from beginning to end",
            "it does nothing that was promised",
        ),
        (
            "one star for this {i}, and that is too many",
            "my whole family is disappointed with the {i}",
            "i threw this {i} into the bin after a day",
            "a sad waste of an evening",
        ),
    ),
}
ASIDE = (
    "it came on {d} in a brown box",
    "i bought the {i} for my sister",
    "i had read about it in a paper",
    "the {i} is the second that i own",
    "my neighbour has one too",
    "it cost {a}",
)


def reviews() -> pd.DataFrame:
    """Columns `department`, `title`, `review`, `liked` (0 or 1) and `part` ("train" or "test")."""
    rng = np.random.default_rng(20_011)
    rows = []
    for department, (items, count) in DEPARTMENTS.items():
        for _ in range(count):
            liked, testing = int(rng.random() < 0.5), bool(rng.random() < TEST_SHARE)
            item, amount = str(rng.choice(items)), f"{int(rng.integers(2, 90)) * 5} euros"
            parts = [str(rng.choice(SAID[liked][testing])), *map(str, rng.choice(ASIDE, 2, replace=False))]
            said = [part.format(i=item, d=str(rng.choice(DAYS)), a=amount) for part in rng.permutation(parts)]
            rows.append(
                {
                    "department": department,
                    "title": f"{item}, {rng.choice(DAYS)}",
                    "review": ". ".join(said),
                    "liked": liked,
                    "part": "test" if testing else "train",
                }
            )
    return pd.DataFrame(rows)

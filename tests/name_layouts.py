"""Texts in the layouts in which answers name people, counted by hand: each mention stands between ⟨ and ⟩."""

from __future__ import annotations

import re
from typing import NamedTuple


class Layout(NamedTuple):
    name: str
    marked: str
    count: int  # of mentions, by hand

    @property
    def text(self) -> str:
        return re.sub("[⟨⟩]", "", self.marked)

    @property
    def spans(self) -> list[tuple[int, int, str]]:
        """(start, end, "person") of each mention in `text`."""
        marks = [m.start() - i for i, m in enumerate(re.finditer("[⟨⟩]", self.marked))]
        return [(start, end, "person") for start, end in zip(marks[::2], marks[1::2], strict=True)]


LAYOUTS = [
    Layout("prose", "⟨John Smith⟩ met ⟨Maria Gonzalez⟩ at the bakery.", 2),
    Layout("commas", "⟨Anna Smith⟩, ⟨Bob Jones⟩, ⟨Carla Diaz⟩", 3),
    Layout("lines", "⟨Anna Smith⟩\n⟨Bob Jones⟩\n⟨Carla Diaz⟩", 3),
    Layout("lines of Windows", "⟨Anna Smith⟩\r\n⟨Bob Jones⟩\r\n⟨Carla Diaz⟩\r\n", 3),
    Layout("lines with blank lines", "⟨Anna Smith⟩\n\n⟨Bob Jones⟩\n\n⟨Carla Diaz⟩", 3),
    Layout("lines of given names", "The winners are:\n⟨Anna⟩\n⟨Robert⟩\n⟨Carla⟩", 3),
    Layout("lines behind a heading", "The following people were present at the meeting\n⟨Anna Smith⟩\n⟨Bob Jones⟩\n⟨Carla Diaz⟩", 3),
    Layout("bullets", "Present:\n- ⟨Anna Smith⟩\n- ⟨Bob Jones⟩\n- ⟨Carla Diaz⟩", 3),
    Layout("stars", "Present:\n* ⟨Anna Smith⟩\n* ⟨Bob Jones⟩\n* ⟨Carla Diaz⟩", 3),
    Layout("bullets with roles", "- ⟨Anna Smith⟩, the mayor\n- ⟨Bob Jones⟩, a baker\n- ⟨Carla Diaz⟩, a witness", 3),
    Layout("numbers", "1. ⟨Anna Smith⟩\n2. ⟨Bob Jones⟩\n3. ⟨Carla Diaz⟩", 3),
    Layout("table", "| Name | Age |\n|---|---|\n| ⟨Anna Smith⟩ | 34 |\n| ⟨Bob Jones⟩ | 41 |", 2),
    Layout("table of pairs", "| Winner | Loser |\n|---|---|\n| ⟨Anna Smith⟩ | ⟨Bob Jones⟩ |\n| ⟨Carla Diaz⟩ | ⟨David Brown⟩ |", 4),
    Layout("nothing between", "The names on the list were ⟨Anna Smith⟩ ⟨Bob Jones⟩.", 2),
    Layout("initials", "The letter was signed by ⟨J. R. Smith⟩ and by ⟨Mary B. Jones⟩.", 2),
    Layout("titles", "Dr. ⟨Anna Smith⟩ and Prof. ⟨Bob Jones⟩ spoke first.", 2),
    Layout("possessives", "⟨Anna Smith⟩'s car hit ⟨Bob Jones⟩' fence.", 2),
    Layout("hyphens", "The witness ⟨Anna-Maria Smith-Jones⟩ spoke to ⟨Jean-Paul Dubois⟩.", 2),
    Layout("apostrophes", "The owner, ⟨Sean O'Neil⟩, called ⟨Mary D'Angelo⟩.", 2),
    Layout("surname first", "⟨Smith, Anna⟩\n⟨Jones, Robert⟩\n⟨Diaz, Carla⟩", 3),
    Layout("broken in a sentence", "It was a quiet night on the harbour, said ⟨Anna\nSmith⟩, who had seen the fire before anybody else.", 1),
    Layout("broken at the end of a sentence", "The prize of the city went for the second time to ⟨Anna\nSmith⟩.", 1),
    Layout("sentences on lines", "⟨Anna Smith⟩ saw the fire.\n⟨Bob Jones⟩ called the police.\n⟨Carla Diaz⟩ ran away.", 3),
    Layout("sentences without a point", "The fire was first seen by ⟨Anna Smith⟩\n⟨Bob Jones⟩ called the police at once", 2),
    Layout("bold", "**⟨Anna Smith⟩** won, **⟨Bob Jones⟩** lost.", 2),
    Layout("bold lines", "**⟨Anna Smith⟩**\nThe mayor of the town.\n\n**⟨Bob Jones⟩**\nThe baker.", 2),
    Layout("shared surname", "⟨Anna⟩ and ⟨Bob Smith⟩ own the bakery.", 2),
    Layout("quotes", '"⟨Anna Smith⟩" and \N{LEFT DOUBLE QUOTATION MARK}⟨Bob Jones⟩\N{RIGHT DOUBLE QUOTATION MARK} are the names on the door.', 2),
    Layout("signature", "Thank you for your help.\n\nBest regards,\n⟨Anna Smith⟩\nHead of Sales\nAcme Corporation\nPhone: 212 555 0142", 1),
    Layout("letter", "Dear ⟨Bob⟩,\n\nI will be late today.\n\nYours sincerely,\n⟨Anna Smith⟩", 2),
    Layout("two signatures", "Kind regards,\n\n⟨Anna Smith⟩\n⟨Bob Jones⟩", 2),
    Layout("dialogue", "ANNA: Where were you?\nROBERT: At home.\nANNA: Alone?".replace("ANNA", "⟨ANNA⟩").replace("ROBERT", "⟨ROBERT⟩"), 3),
    Layout("dialogue with full names", "⟨Anna Smith⟩: Where were you?\n⟨Bob Jones⟩: At home.", 2),
    Layout("three given names", "The children ⟨Anna⟩, ⟨Robert⟩ and ⟨Carla⟩ were at home.", 3),
    Layout("middle name", "The judge was ⟨Anna Maria Smith⟩, the clerk ⟨Robert Lee Jones⟩.", 2),
    Layout("slashes", "Signed by ⟨Anna Smith⟩/⟨Bob Jones⟩/⟨Carla Diaz⟩.", 3),
    Layout("semicolons", "Authors: ⟨Anna Smith⟩; ⟨Bob Jones⟩; ⟨Carla Diaz⟩", 3),
    Layout("brackets", "The mayor (⟨Anna Smith⟩) met the baker (⟨Bob Jones⟩).", 2),
    Layout("repeated", "⟨Anna Smith⟩ left. Nobody followed ⟨Anna Smith⟩, and ⟨Smith⟩ was alone.", 3),
    Layout("nobody", "The owner of the bakery said\nthat a witness had seen the fire\nbefore the police came.", 0),
]  # fmt: skip

"""Mentions of people and other data in a text: spans of a finder to mentions, and words to count them by. Pure."""

import re
import unicodedata
from collections.abc import Collection

Span = tuple[int, int, str]  # start, end, kind of data
PERSON = "person"
# Labels of the kinds of data; places, organisations and dates identify nobody by themselves and are left out.
_LABELS = {
    PERSON: (
        "PERSON PER NAME GIVEN_NAME SURNAME GIVENNAME FIRSTNAME LASTNAME FIRST_NAME LAST_NAME MIDDLENAME "
        "PERSNAME PRS PS"
    ),
    "email": "EMAIL EMAIL_ADDRESS",
    "phone": "PHONE PHONE_NUMBER PHONENUMBER TELEPHONENUM",
    "card": "CREDIT_CARD CREDITCARDNUMBER",
    "account": "IBAN_CODE IBAN BANK_ACCOUNT ACCOUNTNUM ROUTING_NUMBER",
    "ip": "IP_ADDRESS IP",
    "id": (
        "US_SSN SSN TAX_ID GOVERNMENT_ID PASSPORT DRIVERS_LICENSE ES_NIF ES_NIE IT_FISCAL_CODE PL_PESEL "
        "FI_PERSONAL_IDENTITY_CODE"
    ),
    "address": "BUILDING_NUMBER STREET_NAME SECONDARY_ADDRESS ZIP_CODE STREET STREET_ADDRESS",
}
KINDS = {label: kind for kind, labels in _LABELS.items() for label in labels.split()}
_TITLE = re.compile(r"(?:(?:mr|mrs|ms|miss|dr|prof|sir|rev)\b\.?\s*)+", re.IGNORECASE)
_WORD = re.compile(r"\w+(?:['\N{RIGHT SINGLE QUOTATION MARK}-]\w+)*")
# Prefixes of the Unicode names of letters in scripts without spaces between words.
_UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # they affect the shape of letters inside a word
BREAK = re.compile("\r\n|[\n\r\v\f\x85\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}]")
# Separators of two people inside one span; mentions_in decides about line breaks and about commas ("Smith, Anna").
_BETWEEN = re.compile(
    r",?\s+(?:and|or|und|vs\.?|&)\s+|\s*[;|\t\u2022\uff1b]\s*|(?<=\w)/(?=\w)"
    rf"|(?P<line>[ \t]*(?:{BREAK.pattern})[\s>]*)"
    r"|(?P<comma>\s*[,\u3001\uff0c](?!\s*(?:jr|sr|ii|iii|iv|ph\.?d|m\.?d|esq)\b)\s*)",
    re.IGNORECASE,
)
_ONE_SURNAME = re.compile(r"(?:(?:van|von|de|der|den|la|le|di|da|al|el|bin)\s)*\S+")
_MARKS = ' \n\r\t.,;:!?()[]*_|#>-"\u201c\u201d\u2018'  # characters around a mention that are not part of it


def mentions(text: str, spans: Collection[Span]) -> dict[str, list[str]]:
    """Return {kind: [text of each mention]} from (start, end, kind) spans in any order.

    Overlapping spans of one kind are merged; a span of several people is split. Adjacent spans stay as the finder
    returned them: only the finder knows which neighbours are one name.
    """
    out = {}
    for kind in sorted({kind for *_, kind in spans}):
        merged: list[list[int]] = []
        for start, end in sorted((start, end) for start, end, k in spans if k == kind):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        parts = [part for start, end in merged for part in mentions_in(text, start, end, kind)]
        stripped = [_bare(text[start:end], kind) for start, end, _ in parts]
        if nonempty := [m for m in stripped if re.search(r"[^\W\d_]" if kind == PERSON else r"\w", m)]:
            out[kind] = nonempty
    return out


def mentions_in(text: str, start: int, end: int, kind: str) -> list[Span]:
    """Return the spans of the people in one span.

    Data of other kinds stay whole: a rule has checked their digits, and an address has several lines.
    """
    marks = list(_BETWEEN.finditer(text, start, end)) if kind == PERSON else []
    parts, first = [], start
    for i, mark in enumerate(marks):
        listed = any(m["comma"] for m in [*marks[max(i - 1, 0) : i], *marks[i + 1 : i + 2]])
        if not listed and mark["comma"] in (",", ", ") and _ONE_SURNAME.fullmatch(text[first : mark.start()]):
            continue  # Smith, Anna
        if mark["line"] and _wrapped(text, first, mark, end):
            continue
        parts.append((first, mark.start(), kind))
        first = mark.end()
    return [*parts, (first, end, kind)]


def _wrapped(text: str, start: int, gap: re.Match[str], end: int) -> bool:
    """Return whether a sentence continues over the line break `gap`, so that the text around it is one name.

    True if there is prose on the line before the name and on the next one after it (or the end of the sentence), and
    not two words of a name on either side. Limitations: a wrapped name counts as two people if it begins its first line
    or ends its second one without a full stop, or if the line has only capitalised words; two people count as one if a
    finder returned them as one span and two sentences meet there without a full stop ("seen by Anna", "Bob ran away").
    """
    right, *_ = BREAK.split(text[gap.end() : end], maxsplit=1)
    before = BREAK.split(text[:start])[-1]
    behind = BREAK.split(text[gap.end() + len(right) :], maxsplit=1)[0]
    if len(BREAK.findall(gap[0])) > 1 or not right[:1].isalpha() or not _is_prose(before):
        return False
    two_names = len(text[start : gap.start()].split()) > 1 and len(right.split()) > 1
    return not two_names and (_is_prose(behind) or behind[:1] in (".", "!", "?"))


def _is_prose(text: str) -> bool:
    return any(not word[0].isupper() for word in re.findall(r"[^\W\d_]+", text))


def _bare(mention: str, kind: str) -> str:
    if kind == PERSON:
        mention = mention.strip(_MARKS)
        mention = _TITLE.sub("", mention, count=1) if _TITLE.match(mention) else mention
        mention = re.sub(r"['\N{RIGHT SINGLE QUOTATION MARK}]s?$", "", mention)
    return mention.strip(_MARKS)


def count_words(text: str) -> int:
    """Return the number of words: single letters in scripts without spaces, else separated by spaces and punctuation.

    Combining marks neither count nor split a word.
    """
    if text.isascii():
        return len(_WORD.findall(text))
    plain = "".join(c for c in text if c not in _JOINERS and unicodedata.category(c)[0] != "M")
    alone = {c for c in set(plain) if unicodedata.category(c) in ("Lo", "Lm", "Nl") and has_no_spaces(c)}
    spaced = "".join(" " if c in alone else c for c in plain)
    return sum(c in alone for c in plain) + len(_WORD.findall(spaced))


def has_no_spaces(character: str) -> bool:
    """Return whether a letter is of a script without spaces between words."""
    return unicodedata.name(character, "").startswith(_UNSPACED)

"""What a page consists of, by Python's own parser: read strictly, so that what is not closed is a fault."""

from __future__ import annotations

import json
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "wbr"}
OPTIONAL_END = {"li", "dt", "dd", "p"}
"""Elements whose end may be left out; memplan's pages never do."""


class Page(HTMLParser):
    """The elements, texts and attributes of a page.

    Raises:
        AssertionError: an element is closed that is not the last one opened.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of this name."""
        return [attrs for name, attrs in self.tags if name == tag]

    def text(self, tag: str = "") -> str:
        """What stands in elements of this name, or what is to be read anywhere."""
        return "".join(text for name, text in self.texts if (name == tag if tag else name not in {"script", "style"}))

    @property
    def document(self) -> dict:
        """The JSON in it."""
        scripts = [attrs for attrs in self.all("script") if attrs.get("id") == "document"]
        assert [attrs.get("type") for attrs in scripts] == ["application/json"]
        return json.loads(next(text for name, text in self.texts if name == "script"))


ADDRESSES = ("src", "href", "action", "data", "poster", "srcset", "formaction", "background")


def faults_of(page: Page) -> list[str]:
    """What is wrong with a page that has to be self-contained, safe and readable by a machine."""
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    found = [f"id {one} twice" for one in {one for one in ids if ids.count(one) > 1}]
    for tag, attrs in page.tags:
        found += [f"<{tag}> runs {name}" for name in attrs if name.startswith("on")]
        for name in ADDRESSES:
            address = attrs.get(name) or ""
            if address and not address.startswith("#") and not (tag == "a" and address.startswith("https://")):
                found.append(f"<{tag}> loads {address}")
        for name in ("aria-labelledby", "aria-describedby"):
            found += [f"{name} names {one}" for one in (attrs.get(name) or "").split() if one not in ids]
    found += [f"<{tag}>" for tag in ("iframe", "object", "embed", "base") if page.all(tag)]
    policy = next((attrs.get("content") or "" for attrs in page.all("meta") if "http-equiv" in attrs), "")
    found += [] if "form-action 'none'" in policy else ["a form could be sent"]
    policies = [attrs.get("content") or "" for attrs in page.all("meta") if "http-equiv" in attrs]
    if len(policies) != 1 or not policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'"):
        found.append(f"policy {policies}")
    found += ["more may run than what is known"] if any("script-src 'unsafe" in one for one in policies) else []
    found += [f"{len(page.all('h1'))} h1"] if len(page.all("h1")) != 1 else []
    found += ["no language"] if [attrs.get("lang") for attrs in page.all("html")] != ["en"] else []
    found += [] if page.text("title").strip() else ["no title"]
    return found

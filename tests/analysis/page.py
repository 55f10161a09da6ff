"""Pages, read as a browser would."""

from html.parser import HTMLParser

VOID = {"meta", "img", "source", "br"}
LOADS = {"src", "srcset", "href", "data", "poster", "action", "background"}


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers texts, alternative texts and what would be loaded."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.loaded, self.alts, self.texts = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loaded += [value for name, value in attrs if name in LOADS]
        self.alts += [dict(attrs).get("alt")] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)

    def assert_self_contained(self):
        """Nothing is fetched and nothing runs."""
        assert self.loaded
        assert all(value.startswith("data:image/png;base64,") for value in self.loaded)
        assert not {"script", "link", "iframe", "object", "base"} & set(self.tags)
        assert not any(word in self.text for word in ("@import", "url(", "http:", "https:"))  # in the style too

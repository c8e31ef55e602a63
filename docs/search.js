// The site's search, in the place of Fuse: smalldocs.js makes one `Fuse` from search.json and asks it for entries.
// What a reader types is first a word of words.yml, then a name, then an argument or a key of a table, then a word of a title, then of the text.
window.Fuse = class {
  constructor(entries) {
    this.entries = entries.map((e, place) => ({
      item: e, place, api: !!e.kind, name: (e.section || e.title).toLowerCase(), title: e.title.toLowerCase(),
      names: e.names || [], keys: e.keys || [], words: (e.words || []).map((w) => w.toLowerCase()),
      text: (e.text || "").toLowerCase(),
    }));
  }

  score(entry, query, words) {
    const { name, names, keys, title, text, api, item } = entry;
    const all = [name, title, ...entry.words, ...names, ...keys, text].join(" ");
    if (!words.every((w) => all.includes(w))) return 0;
    const begins = (place) => words.every((w) => place.split(/[^a-z0-9]+/).some((p) => p.startsWith(w)));
    const grade = entry.words.includes(query) ? 1300
      : name === query ? 1000 + 200 * api
      : name.startsWith(query) ? 500 + 200 * api
      : names.includes(query) ? 440 + 20 * (item.kind === "class") + 30 * !!item.top - Math.min(names.length, 40)
      : keys.includes(query) ? 430
      : begins(name) ? 300 + 100 * api
      : begins(title) ? 200
      : begins(text) ? 100 : 20;
    const seen = words.reduce((n, w) => n + Math.min(text.split(w).length - 1, 8), 0);
    return grade + (grade < 300 ? seen : 0) + (item.section ? 0 : 10) - Math.min(name.length, 60) / 4 - entry.place / 1000;
  }

  search(text, { limit = 20 } = {}) {
    let words = text.toLowerCase().split(/[^a-z0-9_]+/).filter(Boolean);
    for (let tries = 0; words.length && tries < 4; tries += 1) {
      const query = words.join(" ");
      const found = this.entries.map((e) => ({ item: e.item, score: this.score(e, query, words) })).filter((h) => h.score > 0);
      if (found.length) return found.sort((a, b) => b.score - a.score).slice(0, limit);
      words = words.map((w) => (w.length > 4 ? w.slice(0, -1) : w));  // "blends" finds what "blend" finds
    }
    return [];
  }
};

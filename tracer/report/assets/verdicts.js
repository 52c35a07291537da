// What the reader says about training examples: confirmed as wrong, or ignored. It stays in the browser, by the page's
// examples and labels, and is downloaded as CSV or JSON for tracer.apply_corrections.

class Verdicts {
  constructor() {
    this.key = `tracer-verdicts-${DATA.key}`;
    this.of = new Map();
    this.changed = () => {};
    try {
      for (const [index, verdict] of JSON.parse(localStorage.getItem(this.key) || "[]")) this.of.set(index, verdict);
    } catch { /* storage is off, or holds something else: the page works without it */ }
  }

  get(index) { return this.of.get(index) || ""; }

  set(index, verdict) {
    if (verdict) this.of.set(index, verdict); else this.of.delete(index);
    try {
      localStorage.setItem(this.key, JSON.stringify([...this.of]));
    } catch { /* as above */ }
    this.changed();
  }

  // Two buttons for an example; pressing one again takes the verdict back.
  buttons(index) {
    const group = make("span", { class: "group verdict", role: "group", "aria-label": `Verdict on training example ${index}` });
    const draw = () => {
      for (const button of group.children) button.setAttribute("aria-pressed", String(button.dataset.verdict === this.get(index)));
    };
    const texts = { confirmed: ["✓", "Confirm: the label is wrong"], ignored: ["✕", "Ignore: the label is right"] };
    for (const [verdict, [text, title]] of Object.entries(texts)) {
      group.append(make("button", {
        type: "button", "data-verdict": verdict, title, "aria-label": title,
        onclick: () => { this.set(index, this.get(index) === verdict ? "" : verdict); draw(); },
      }, text));
    }
    draw();
    return group;
  }

  rows() {
    return [...this.of].sort((a, b) => a[0] - b[0]).map(([index, verdict]) => {
      const place = TABLE.place.get(index);
      return { id: TRAIN_IDS.text(index) || index, label: TABLE.labels.at(place), suggested_label: TABLE.suggested.at(place), verdict };
    });
  }

  csv() {
    // An apostrophe before what a spreadsheet would run as a formula, as in the other files of a report.
    const safe = (value) => (typeof value === "string" && /^[=+\-@\t\r\n]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : String(value));
    const cell = (value) => (/[",\r\n]/.test(safe(value)) ? `"${safe(value).replaceAll('"', '""')}"` : safe(value));
    const names = ["id", "label", "suggested_label", "verdict"];
    return [names, ...this.rows().map((row) => names.map((name) => row[name]))].map((row) => `${row.map(cell).join(",")}\r\n`).join("");
  }

  download(kind) {
    const text = kind === "csv" ? this.csv() : `${JSON.stringify(this.rows(), null, 1)}\n`;
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: kind === "csv" ? "text/csv" : "application/json" })), download: `verdicts.${kind}` });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}

const VERDICTS = new Verdicts();

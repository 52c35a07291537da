// The table of training examples: filtered, sorted and paged; images can be shown as cards.

class Suspects {
  constructor(root) {
    this.root = root;
    this.page = 0;
    this.sort = { key: DATA.sort, descending: true };
    this.view = TRAIN_INPUTS.kind === "images" ? "cards" : "table";
    this.find = (name) => root.querySelector(`[data-control="${name}"]`);
    this.order = Int32Array.from(TABLE.indices, (_, place) => place);
    this.fill();
    for (const name of ["search", "label", "flag", "size", "sort"]) {
      const control = this.find(name);
      if (control) control.addEventListener(name === "search" ? "input" : "change", () => this.changed(name));
    }
    for (const button of root.querySelectorAll("[data-view]")) {
      button.addEventListener("click", () => { this.view = button.dataset.view; this.show(); });
    }
    for (const kind of ["csv", "json"]) this.find(kind).addEventListener("click", () => VERDICTS.download(kind));
    VERDICTS.changed = () => this.countVerdicts();
    this.countVerdicts();
    this.find("page").addEventListener("change", () => this.go(Number(this.find("page").value) - 1));
    const last = () => this.pages - 1;
    const moves = { first: () => 0, previous: () => this.page - 1, next: () => this.page + 1, last };
    for (const [name, to] of Object.entries(moves)) this.find(name).addEventListener("click", () => this.go(to()));
    this.update();
  }

  // Fill the lists of labels and of columns.
  fill() {
    const label = this.find("label");
    if (label) {
      const collate = new Intl.Collator("en", { numeric: true });
      const names = TABLE.labels.names.map((name, code) => [name, code]).sort((a, b) => collate.compare(a[0], b[0]));
      for (const [name, code] of names) label.append(make("option", { value: code }, name));
    }
    const sort = this.find("sort");
    for (const column of TABLE.columns) {
      sort.append(make("option", { value: `${column.key} down` }, `${column.title}, highest first`));
      sort.append(make("option", { value: `${column.key} up` }, `${column.title}, lowest first`));
    }
    sort.append(make("option", { value: "index up" }, "Index"));
    if (TABLE.labels.present) sort.append(make("option", { value: "label up" }, "Label"));
    const fields = make("optgroup", { label: "Fields" });
    TRAIN_INPUTS.fields.forEach((name, field) => {
      fields.append(make("option", { value: `field${field} down` }, `${name}, highest first`));
      fields.append(make("option", { value: `field${field} up` }, `${name}, lowest first`));
    });
    if (TRAIN_INPUTS.fields.length) sort.append(fields);
    sort.value = `${this.sort.key} down`;
  }

  countVerdicts() {
    const verdicts = [...VERDICTS.of.values()];
    const confirmed = verdicts.filter((verdict) => verdict === "confirmed").length;
    this.find("verdicts").textContent = verdicts.length
      ? `${count(confirmed)} confirmed, ${count(verdicts.length - confirmed)} ignored` : "no verdicts yet";
    for (const kind of ["csv", "json"]) this.find(kind).disabled = !verdicts.length;
  }

  get pageSize() { return Number(this.find("size").value); }
  get pages() { return Math.max(1, Math.ceil(this.order.length / this.pageSize)); }

  changed(name) {
    if (name === "sort") {
      const [key, way] = this.find("sort").value.split(" ");
      this.sort = { key, descending: way === "down" };
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.update(), name === "search" ? 160 : 0);
  }

  sortBy(key) {
    const same = this.sort.key === key;
    const numeric = !["index", "label", "prediction"].includes(key);
    this.sort = { key, descending: same ? !this.sort.descending : numeric };
    const value = `${key} ${this.sort.descending ? "down" : "up"}`;
    const select = this.find("sort");
    select.value = Array.from(select.options, (option) => option.value).includes(value) ? value : "";
    this.update();
    const button = this.root.querySelector(`th[data-key="${key}"] button`);
    if (button) button.focus();
  }

  update() {
    const words = this.find("search").value.trim().toLowerCase();
    const label = this.find("label") ? this.find("label").value : "";
    const shown = this.find("flag").value;
    const verdict = { confirmed: "confirmed", ignored: "ignored", undecided: "" }[shown];
    const flag = verdict === undefined ? shown : "";
    const kept = [];
    const named = (names) => names.names.map((name) => name.toLowerCase().includes(words));
    const [byLabel, byPrediction] = [named(TABLE.labels), named(TABLE.predictions)];
    const code = Number(label);
    const [flagName, wanted] = flag ? [flag.replace("not-", ""), flag.startsWith("not-") ? 0 : 1] : ["", 0];
    for (let place = 0; place < TABLE.indices.length; place += 1) {
      if (label !== "" && TABLE.labels.codes[place] !== code) continue;
      if (verdict !== undefined && VERDICTS.get(TABLE.indices[place]) !== verdict) continue;
      if (flag && TABLE.flags[flagName][place] !== wanted) continue;
      if (words && !(String(TABLE.indices[place]) === words || byLabel[TABLE.labels.codes[place]]
        || byPrediction[TABLE.predictions.codes[place]] || TRAIN_INPUTS.text(TABLE.indices[place]).toLowerCase().includes(words)
        || TRAIN_IDS.text(TABLE.indices[place]).toLowerCase().includes(words))) continue;
      kept.push(place);
    }
    this.order = Int32Array.from(kept);
    this.sortOrder();
    this.page = 0;
    this.show();
  }

  sortOrder() {
    const { key, descending } = this.sort;
    const sign = descending ? -1 : 1;
    const column = TABLE.columns.find((each) => each.key === key);
    let values = column ? column.values : TABLE.indices;
    const names = key === "label" ? TABLE.labels : key === "prediction" ? TABLE.predictions : null;
    if (names) { // a rank for each name, so that names compare as numbers
      const rank = ranksOf(names.names);
      values = Int32Array.from(names.codes, (code) => rank[code]);
    } else if (key.startsWith("field")) {
      const last = descending ? -Infinity : Infinity;
      values = TRAIN_INPUTS.ranks(Number(key.slice(5)), TABLE.indices).map((value) => (Number.isNaN(value) ? last : value));
    }
    this.order.sort((a, b) => sign * (values[a] - values[b]) || a - b);
  }

  go(page) {
    this.page = Math.min(this.pages - 1, Math.max(0, Number.isFinite(page) ? page : 0));
    this.show();
  }

  show() {
    const start = this.page * this.pageSize;
    const places = Array.from(this.order.subarray(start, start + this.pageSize));
    const body = this.root.querySelector("[data-examples]");
    body.replaceChildren(this.view === "cards" ? this.cards(places) : this.table(places, start));
    if (!places.length) body.replaceChildren(make("p", { class: "missing" }, "No training example matches these filters."));
    const total = this.order.length;
    this.find("status").textContent = `${count(total)} of ${count(TABLE.indices.length)} training examples`
      + (total ? `, ${count(start + 1)} to ${count(start + places.length)} shown` : "");
    this.find("pages").textContent = `of ${count(this.pages)}`;
    this.find("page").value = this.page + 1;
    this.find("page").max = this.pages;
    for (const name of ["first", "previous"]) this.find(name).disabled = this.page === 0;
    for (const name of ["next", "last"]) this.find(name).disabled = this.page >= this.pages - 1;
    for (const button of this.root.querySelectorAll("[data-view]")) {
      button.setAttribute("aria-pressed", String(button.dataset.view === this.view));
    }
  }

  cards(places) {
    return make("ul", { class: "grid" }, ...places.map((place) => {
      const index = TABLE.indices[place];
      const [label, prediction, suggested] = [TABLE.labels.at(place), TABLE.predictions.at(place), TABLE.suggested.at(place)];
      const column = TABLE.columns.find((each) => each.key === this.sort.key) || TABLE.columns[0];
      const known = flagOf("known", index);
      return make("li", { class: known ? "tile known" : "tile" },
        make("div", { class: "top" }, make("span", {}, `train ${index}`), make("span", {}, `#${place + 1}`)),
        TRAIN_INPUTS.show(index, "", label && `label ${label}`),
        TRAIN_IDS.show(index),
        label && make("div", {}, "label ", make("b", {}, label)),
        prediction && make("div", {}, "predicted ", make("b", {}, prediction)),
        suggested && make("div", {}, "suggested ", make("b", {}, suggested)),
        make("div", { class: "num" }, `${column.title.toLowerCase()} ${number(column.values[place])}`),
        known ? make("span", { class: "flag known" }, "mislabelled") : null,
        VERDICTS.buttons(index));
    }));
  }

  table(places, start) {
    const header = (key, title, help, css) => make("th", {
      scope: "col", class: css, "data-key": key, title: help || null,
      "aria-sort": this.sort.key === key ? (this.sort.descending ? "descending" : "ascending") : "none",
    }, make("button", { type: "button", onclick: () => this.sortBy(key) }, title));
    const plain = (title) => make("th", { scope: "col" }, title);
    const heads = [make("th", { scope: "col", class: "number" }, "#"), header("index", "Example", "", "number")];
    if (TRAIN_IDS.present) heads.push(plain("Id"));
    if (TRAIN_INPUTS.kind !== "absent") heads.push(plain("Input"));
    if (TABLE.labels.present) heads.push(header("label", "Label"));
    if (TABLE.predictions.present) heads.push(header("prediction", "Prediction"));
    if (TABLE.suggested.present) heads.push(plain("Suggested"));
    for (const column of TABLE.columns) heads.push(header(column.key, column.title, column.help, "number"));
    if (Object.keys(TABLE.flags).length) heads.push(plain("Flags"));
    heads.push(plain("Verdict"));
    const lines = places.map((place, offset) => make("tr", {}, ...this.cells(place, start + offset + 1)));
    const table = make("table", { class: "examples" }, make("caption", {}, "Training examples; click a heading to sort by its column"),
      make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...lines));
    return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Training examples" }, table);
  }

  cells(place, position) {
    const index = TABLE.indices[place];
    const cells = [make("td", { class: "number" }, String(position)), make("th", { scope: "row", class: "number" }, String(index))];
    const label = TABLE.labels.at(place);
    if (TRAIN_IDS.present) cells.push(make("td", {}, TRAIN_IDS.show(index)));
    if (TRAIN_INPUTS.kind !== "absent") {
      const css = TRAIN_INPUTS.kind === "images" ? null : "wide-cell";
      cells.push(make("td", { class: css }, TRAIN_INPUTS.show(index, "small", label && `label ${label}`)));
    }
    if (TABLE.labels.present) cells.push(make("td", {}, label));
    if (TABLE.predictions.present) cells.push(make("td", {}, TABLE.predictions.at(place)));
    if (TABLE.suggested.present) cells.push(make("td", {}, TABLE.suggested.at(place)));
    for (const column of TABLE.columns) cells.push(make("td", { class: "number" }, number(column.values[place])));
    const words = { known: "mislabelled", suspect: "suspect", disagrees: "model disagrees" };
    const flags = Object.keys(TABLE.flags).filter((name) => TABLE.flags[name][place]);
    if (Object.keys(TABLE.flags).length) {
      cells.push(make("td", {}, ...flags.flatMap((name) => [make("span", { class: `flag ${name}` }, words[name]), " "])));
    }
    cells.push(make("td", {}, VERDICTS.buttons(index)));
    return cells;
  }
}

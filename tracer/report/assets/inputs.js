// The input of an example: a thumbnail from a sheet, a text, the numbers of a vector, or nothing.

class Inputs {
  constructor(packed, noun) {
    this.kind = packed.kind;
    this.noun = noun;
    this.packed = packed;
    this.place = new Map(Array.from(unpack(packed.indices, Int32Array), (index, place) => [index, place]));
    this.sheets = [];
    if (this.kind === "vectors") {
      this.values = unpack(packed.values, Float32Array);
      this.mean = unpack(packed.mean, Float32Array);
      this.deviation = unpack(packed.deviation, Float32Array);
    }
    this.columns = this.kind === "records" ? packed.fields.map((field) => new Names(field.values)) : [];
    this.fields = this.kind === "records" ? packed.fields.map((field) => field.name) : packed.names || [];
  }

  has(index) { return this.place.has(index); }

  text(index) {
    if (!this.has(index)) return "";
    const place = this.place.get(index);
    if (this.kind === "records") return this.fields.map((name, field) => `${name}: ${this.columns[field].at(place)}`).join("\n");
    return this.kind === "texts" ? this.packed.texts[place] : "";
  }

  // Return numbers that sort examples as a field of records, or a number of vectors, does; NaN where it is absent.
  ranks(field, indices) {
    const places = Array.from(indices, (index) => this.place.get(index));
    if (this.kind === "vectors") return places.map((place) => this.values[place * this.fields.length + field]);
    const { names, codes } = this.columns[field];
    const numeric = names.every((name) => name === "" || Number.isFinite(Number(name)));
    const rank = numeric ? names.map((name) => (name === "" ? NaN : Number(name))) : ranksOf(names);
    return places.map((place) => (place === undefined ? NaN : rank[codes[place]]));
  }

  // Return an element that shows the input; `size` is "", "small" or "large"; null where inputs are absent.
  show(index, size, words) {
    if (this.kind === "absent") return null;
    if (!this.has(index)) return make("span", { class: "missing" }, `${this.noun} ${index}: input not in this page`);
    if (this.kind === "images") return this.thumbnail(index, size, words);
    if (this.kind === "texts") {
      const text = this.text(index);
      return make("span", { class: size === "large" ? "text" : "text clip", title: size === "large" ? null : text }, text);
    }
    return this.kind === "records" ? this.record(index) : this.features(index);
  }

  thumbnail(index, size, words) {
    const { width, height } = this.packed;
    const crisp = Math.max(width, height) <= 40;
    const canvas = make("canvas", {
      width, height, class: `thumb ${size} ${crisp ? "crisp" : ""}`, role: "img",
      "aria-label": [`Image of ${this.noun} ${index}`, words].filter(Boolean).join(", "),
    });
    this.draw(canvas, this.place.get(index));
    return canvas;
  }

  async draw(canvas, place) {
    const { width, height, columns, per_sheet: perSheet, sheets } = this.packed;
    const which = Math.floor(place / perSheet);
    const inside = place % perSheet;
    if (!this.sheets[which]) {
      const image = new Image();
      image.src = sheets[which];
      this.sheets[which] = image.decode().then(() => image);
    }
    const image = await this.sheets[which];
    const x = (inside % columns) * width;
    const y = Math.floor(inside / columns) * height;
    canvas.getContext("2d").drawImage(image, x, y, width, height, 0, 0, width, height);
    canvas.dataset.drawn = "yes";
  }

  record(index) {
    const list = make("span", { class: "features" });
    this.fields.forEach((name, field) => {
      const value = this.columns[field].at(this.place.get(index));
      if (value) list.append(make("span", { title: `${name}: ${value}` }, make("i", {}, name), value));
    });
    return list;
  }

  features(index) {
    const { names, width } = this.packed;
    const first = this.place.get(index) * names.length;
    const list = make("span", { class: "features" });
    names.forEach((name, place) => {
      const value = this.values[first + place];
      const spread = this.deviation[place];
      const z = spread > 0 ? (value - this.mean[place]) / spread : 0;
      const title = `${name}: ${number(value)}, ${number(z, true)} standard deviations from the mean`;
      list.append(make("span", { title, style: tint(z / 3) }, make("i", {}, name), number(value)));
    });
    if (width > names.length) list.append(make("span", { class: "missing" }, `and ${width - names.length} more`));
    return list;
  }
}

// A background between orange (-1) and blue (1), readable in both themes.
function tint(part) {
  const share = Math.min(1, Math.abs(part)) * 0.55;
  if (!(share > 0.01)) return null;
  return `background-color: color-mix(in srgb, var(${part > 0 ? "--pos" : "--neg"}) ${Math.round(share * 100)}%, transparent)`;
}

const TRAIN_INPUTS = new Inputs(DATA.train, "training example");
const TARGET_INPUTS = new Inputs(DATA.target, "target");

function plainTokens(tokens) {
  const gap = !tokens.some((token) => /\s/.test(token)) && tokens.some((token) => token.length > 1);
  const between = () => (gap ? " " : make("wbr"));
  return make("span", { class: gap ? "tokens" : "tokens tight" }, ...tokens.flatMap((token) => [make("span", {}, token), between()]));
}

// The tokens of a training example, colored by their scores for a target, and the same as a table.
function coloredTokens(target, index) {
  const scores = DATA.tokens && DATA.tokens.scores[`${target},${index}`];
  if (!scores) return null;
  const tokens = DATA.tokens.train[index];
  const largest = Math.max(...scores.map(Math.abs)) || 1;
  const shown = plainTokens(tokens);
  const spans = shown.querySelectorAll("span");
  scores.forEach((score, place) => {
    const token = spans[place];
    token.title = `${tokens[place]}: ${number(score, true)}`;
    const style = tint(score / largest);
    if (style) token.setAttribute("style", style);
  });
  const body = make("tbody", {}, ...scores.map((score, place) => make("tr", {},
    make("th", { scope: "row" }, tokens[place]), make("td", { class: "number" }, number(score, true)))));
  const head = make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "token"), make("th", { scope: "col", class: "number" }, "score")));
  const table = make("table", {}, make("caption", {}, `Tokens of training example ${index} for target ${target}`), head, body);
  return make("div", {}, shown, make("details", {}, make("summary", {}, "Scores of the tokens"), make("div", { class: "scroll" }, table)));
}

// One target at a time with its proponents and opponents, chosen by buttons, index, search or arrow keys.

const STRIP = 14;

class Targets {
  constructor(root) {
    this.root = root;
    this.find = (name) => root.querySelector(`[data-control="${name}"]`);
    this.matches = Array.from(TARGETS.indices, (_, place) => place);
    this.at = 0;
    this.first = 0;
    this.find("previous").addEventListener("click", () => this.go(this.at - 1));
    this.find("next").addEventListener("click", () => this.go(this.at + 1));
    this.find("search").addEventListener("input", () => this.filter());
    if (this.find("which")) this.find("which").addEventListener("change", () => this.filter());
    this.find("number").addEventListener("change", () => this.jump(Number(this.find("number").value)));
    root.addEventListener("keydown", (event) => {
      const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
      if (typing || event.altKey || event.ctrlKey || event.metaKey) return;
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || event.target.closest(".scroll")) return;
      event.preventDefault();
      this.go(this.at + step);
    });
    this.show();
  }

  filter() {
    const words = this.find("search").value.trim().toLowerCase();
    const which = this.find("which") ? this.find("which").value : "";
    this.matches = Array.from(TARGETS.indices, (_, place) => place).filter((place) => {
      const [label, prediction] = [TARGETS.labels.at(place), TARGETS.predictions.at(place)];
      if (which === "wrong" && label === prediction) return false;
      if (which === "right" && label !== prediction) return false;
      if (!words) return true;
      const index = TARGETS.indices[place];
      return String(index) === words || [label, prediction, TARGET_INPUTS.text(index), TARGET_IDS.text(index)].some((text) => text.toLowerCase().includes(words));
    });
    this.at = 0;
    this.first = 0;
    this.show();
  }

  jump(index) {
    const place = this.matches.findIndex((match) => TARGETS.indices[match] === index);
    if (place >= 0) this.go(place);
    else this.find("status").textContent = `Target ${index} is not among the ${count(this.matches.length)} that match.`;
  }

  go(place) {
    const focused = document.activeElement && document.activeElement.closest(".strip");
    this.at = Math.min(this.matches.length - 1, Math.max(0, place));
    this.show();
    if (focused) this.root.querySelector('.strip [aria-current="true"]').focus();
  }

  show() {
    const view = this.root.querySelector("[data-target]");
    const strip = this.root.querySelector(".strip");
    if (!this.matches.length) {
      strip.replaceChildren();
      view.replaceChildren(make("p", { class: "missing" }, "No target matches."));
      this.find("status").textContent = "0 targets";
      return;
    }
    if (this.at < this.first || this.at >= this.first + STRIP) {
      this.first = Math.max(0, Math.min(this.at - Math.floor(STRIP / 2), this.matches.length - STRIP));
    }
    strip.replaceChildren(...this.matches.slice(this.first, this.first + STRIP).map((place, offset) => this.button(place, this.first + offset)));
    const place = this.matches[this.at];
    const index = TARGETS.indices[place];
    this.find("number").value = index;
    this.find("previous").disabled = this.at === 0;
    this.find("next").disabled = this.at === this.matches.length - 1;
    this.find("status").textContent = `Target ${index}, ${count(this.at + 1)} of ${count(this.matches.length)}`;
    const flat = TARGET_INPUTS.kind !== "images";
    view.className = flat ? "target flat" : "target";
    view.replaceChildren(this.card(place, index), make("div", { class: flat ? "ends both" : "ends" }, ...TARGETS.ends.map((end) => this.end(end, place, index))));
  }

  button(place, at) {
    const index = TARGETS.indices[place];
    const label = TARGETS.labels.at(place);
    const words = label ? `Target ${index}, label ${label}` : `Target ${index}`;
    const inside = TARGET_INPUTS.kind === "images" && TARGET_INPUTS.has(index)
      ? [TARGET_INPUTS.thumbnail(index, "", ""), `${label || index}`] : [label ? `${index}: ${label}` : `target ${index}`];
    return make("li", {}, make("button", {
      type: "button", "aria-label": words, title: words, "aria-current": at === this.at ? "true" : null, onclick: () => this.go(at),
    }, ...inside));
  }

  card(place, index) {
    const [label, prediction] = [TARGETS.labels.at(place), TARGETS.predictions.at(place)];
    const facts = make("dl", { class: "facts" });
    const add = (name, value) => facts.append(make("dt", {}, name), make("dd", {}, value));
    if (TARGET_IDS.present) add("id", TARGET_IDS.show(index));
    if (label) add("label", make("b", {}, label));
    if (prediction) add("predicted", prediction === label ? prediction : make("b", { class: "score neg" }, label ? `${prediction} (wrong)` : prediction));
    if (TARGETS.mean) add("mean score", number(TARGETS.mean[place], true));
    const tokens = DATA.tokens && DATA.tokens.target[index];
    const shown = tokens ? plainTokens(tokens) : TARGET_INPUTS.show(index, "large", label && `label ${label}`);
    return make("div", { class: "target-card" }, make("h3", {}, `Target ${index}`), shown, facts);
  }

  end(end, place, index) {
    const positive = end.name === "proponents";
    const first = place * end.k;
    const inside = Array.from({ length: end.k }, (_, rank) => first + rank);
    // the k strongest go on past zero if fewer examples help, or harm
    const places = inside.filter((at) => (positive ? end.scores[at] > 0 : end.scores[at] < 0));
    const largest = Math.max(...TARGETS.ends.map((each) => (each.k ? Math.abs(each.scores[place * each.k]) : 0))) || 1;
    const title = positive ? "Proponents" : "Opponents";
    const heading = make("h3", { class: positive ? "pos" : "neg" }, title);
    if (!places.length) {
      return make("div", {}, heading, make("p", { class: "missing" }, `No training example has a score ${positive ? "above" : "below"} zero.`));
    }
    const cards = places.map((at) => this.tile(end.indices[at], end.scores[at], largest, index));
    return make("div", {}, heading,
      make("ol", { class: TRAIN_INPUTS.kind === "images" ? "grid" : "stack", "aria-label": `${title} of target ${index}` }, ...cards));
  }

  tile(index, score, largest, target) {
    const label = labelOf(index);
    const sign = score < 0 ? "neg" : "pos";
    const known = flagOf("known", index);
    const meter = make("div", { class: `meter ${sign}`, "aria-hidden": "true" },
      make("span", { style: `width: ${Math.round(Math.min(1, Math.abs(score) / largest) * 100)}%` }));
    return make("li", { class: known ? "tile known" : "tile" },
      make("div", { class: "top" }, make("span", {}, `train ${index}`), make("span", { class: `score ${sign}` }, number(score, true))),
      coloredTokens(target, index) || TRAIN_INPUTS.show(index, "", label && `label ${label}`), TRAIN_IDS.show(index), meter,
      label && make("span", {}, "label ", make("b", {}, label)), " ",
      known ? make("span", { class: "flag known" }, "mislabelled") : null, " ",
      flagOf("suspect", index) && !known ? make("span", { class: "flag suspect" }, "suspect") : null);
  }
}

// The search page. The address of the page has the search, so that Back, reload and links work. A dropped picture cannot be in
// an address; it is kept under a number in this tab's storage.

import { captions, digits, remarks } from "./meaning.js";
import { dropped, keep, restorePictures } from "./pictures.js";

const PAGE = 24;
const by = (id) => document.getElementById(id);
const [text, grid, panel, status, problem] = ["text", "grid", "panel", "status", "problem"].map(by);
let service = { can: [], languages: [], items: 0 };
let current = {}; // the search that is shown: text, id, picture (a number in `dropped`)
let next = null; // offset of the next page, or null
let running = null; // AbortController of the search that is under way
let typing = 0;
let scale = 2; // digits of a score

// ---- the service

class Failed extends Error {}

async function ask(path, fields = null, signal = undefined) {
  const form = fields && new FormData();
  for (const [name, value] of Object.entries(fields ?? {})) if (value != null && value !== "") form.append(name, value);
  let answer;
  try {
    answer = await fetch(path, { method: form ? "POST" : "GET", body: form, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failed("The service does not answer. Is it still running?");
  }
  const body = await answer.json().catch(() => null);
  if (answer.status === 401) openKey();
  if (!answer.ok) throw new Failed(body?.error?.message ?? `The service answered ${answer.status}.`);
  return body;
}

// ---- the search

function fromAddress() {
  const query = new URLSearchParams(location.search);
  const picture = Number(query.get("picture"));
  return { text: query.get("q") ?? "", id: query.get("id"), picture: dropped.has(picture) ? picture : null };
}

function go(to, { replace = false } = {}) {
  const query = new URLSearchParams();
  if (to.text) query.set("q", to.text);
  if (to.id) query.set("id", to.id);
  if (to.picture) query.set("picture", to.picture);
  const address = query.size ? `/?${query}` : "/";
  if (address !== location.pathname + location.search) history[replace ? "replaceState" : "pushState"](null, "", address);
  show(to);
}

async function show(to) {
  const samePicture = to.id === current.id && to.picture === current.picture;
  current = to;
  if (text.value.trim() !== to.text) text.value = to.text;
  document.title = to.text ? `${to.text} · picture search` : "Picture search";
  const home = !to.text && !to.id && !to.picture;
  by("intro").hidden = !home;
  by("notes").replaceChildren();
  if (!samePicture) showPanel(to);
  scrollTo({ top: 0 });
  await (home ? sample() : search());
}

const fields = (to) => ({ text: to.text, id: to.id, image: dropped.get(to.picture) });

async function search() {
  next = 0;
  grid.replaceChildren(...Array.from({ length: 12 }, waiting));
  setStatus("");
  await more(true);
}

async function more(first = false) {
  if (next === null || (running && !first)) return;
  running?.abort();
  const own = (running = new AbortController());
  await loading(async () => {
    const page = await ask("/v1/search", { ...fields(current), offset: next, limit: PAGE }, own.signal);
    if (first) grid.replaceChildren();
    next = page.next_offset;
    if (first) {
      scale = digits(page.results);
      by("notes").replaceChildren(...remarks(page).map((line) => make("p", "", line)));
    }
    grid.append(...page.results.map(tile));
    if (grid.firstElementChild && first) grid.querySelector(".tile").tabIndex = 0;
    showCount();
  }, own);
  if (running === own) running = null;
  // On a tall screen the end is in view at once, and the observer saw it before these results came.
  if (running === null && next !== null && problem.hidden && atEnd()) more();
}

async function sample() {
  running?.abort();
  const own = (running = new AbortController());
  next = null;
  grid.replaceChildren(...Array.from({ length: 12 }, waiting));
  await loading(async () => {
    const { results } = await ask(`/v1/items?limit=${PAGE}`, null, own.signal);
    grid.replaceChildren(...results.map(tile));
    if (results.length) grid.querySelector(".tile").tabIndex = 0;
    examples(results);
    setStatus(results.length ? `A few of ${total()} pictures` : "The index is empty: add pictures to it first.");
  }, own);
  if (running === own) running = null;
}

async function loading(work, own) {
  document.body.classList.add("busy");
  grid.ariaBusy = "true";
  problem.hidden = true;
  try {
    await work();
  } catch (error) {
    if (error.name === "AbortError") return;
    grid.querySelectorAll(".waiting").forEach((cell) => cell.remove());
    problem.firstElementChild.textContent = error instanceof Failed ? error.message : `The page failed: ${error.message}`;
    problem.hidden = false;
    setStatus("");
  } finally {
    if (running === own) {
      document.body.classList.remove("busy");
      grid.ariaBusy = "false";
    }
  }
}

// ---- results

function make(kind, className = "", content = "") {
  const element = document.createElement(kind);
  element.className = className;
  element.textContent = content;
  return element;
}

const waiting = () => {
  const cell = make("li", "waiting");
  cell.ariaHidden = "true";
  return cell;
};

function tile(hit) {
  const [caption = hit.id] = captions(hit.info);
  const cell = make("li");
  const button = make("button", "tile");
  const photo = make("span", "photo");
  const image = new Image();
  image.alt = "";
  image.loading = "lazy";
  image.onload = () => image.classList.add("here", ...(image.naturalWidth < 100 ? ["crisp"] : []));
  image.onerror = () => {
    button.classList.add("missing");
    photo.textContent = "no picture kept";
  };
  if (hit.image) image.src = hit.image;
  else image.onerror();
  photo.append(image);
  button.ariaLabel = caption;
  if (current.text || current.id || current.picture) {
    const known = hit.relevance != null;
    const shown = known ? `${Math.round(100 * hit.relevance)} %` : hit.score.toFixed(scale);
    const score = make("span", "score", shown);
    score.title = known ? `relevance, of the cosine ${hit.score.toFixed(4)}` : `cosine ${hit.score.toFixed(4)}`;
    photo.append(score);
    if (known) {
      const bar = make("span", "bar");
      bar.style.width = `${100 * hit.relevance}%`;
      photo.append(bar);
    }
    button.ariaLabel += `, ${known ? "relevance" : "score"} ${shown}`;
  }
  button.append(photo, make("span", "caption", caption));
  button.type = "button";
  button.tabIndex = -1;
  button.title = caption;
  button.onclick = () => {
    known.set(hit.id, hit);
    go({ text: "", id: hit.id, picture: null });
    text.blur();
  };
  cell.append(button);
  return cell;
}

// A busy index does not answer how many items it has.
const total = () => service.items?.toLocaleString() ?? "all";
const setStatus = (words) => (status.textContent = words);

function showCount() {
  const count = grid.querySelectorAll(".tile").length;
  if (!count) return setStatus("Nothing found.");
  const parts = [`${count} of ${total()} pictures`];
  if (current.text) parts.push("for ", make("b", "", current.text));
  if (current.id || current.picture) parts.push(current.text ? "and like this picture" : "like this picture");
  status.replaceChildren(...parts.flatMap((part, i) => (i && typeof part === "string" ? [" ", part] : [part])));
}

function examples(results) {
  const all = results.flatMap((hit) => captions(hit.info).map((caption) => caption.replace(/[\s.。]+$/, "")));
  const chinese = (caption) => /\p{Script=Han}/u.test(caption);
  const short = all.filter((caption) => caption.length < 44);
  const picked = [...new Set([...short.filter((c) => !chinese(c)).slice(0, 3), ...short.filter(chinese).slice(0, 2)])];
  by("examples").replaceChildren(
    ...picked.map((caption) => {
      const button = make("button", "", caption);
      button.type = "button";
      button.onclick = () => go({ text: caption, id: null, picture: null });
      return button;
    }),
  );
}

// ---- the picture of the search

const known = new Map(); // items that were shown, by id

async function showPanel(to) {
  const present = Boolean(to.id || to.picture);
  panel.hidden = !present;
  document.querySelector("main").classList.toggle("beside", present);
  const source = to.id ? `/v1/pictures/${encodeURIComponent(to.id)}` : to.picture ? URL.createObjectURL(dropped.get(to.picture)) : "";
  const chip = by("chip");
  chip.hidden = !present;
  for (const part of ["captions", "answers", "info"]) by(part).replaceChildren();
  by("reply").hidden = true;
  by("question").hidden = !(present && service.can.includes("answer"));
  if (!present) return;
  const shown = by("shown");
  shown.onload = () => shown.classList.toggle("crisp", shown.naturalWidth < 100);
  shown.src = chip.firstElementChild.src = source;
  const path = `/v1/items/${encodeURIComponent(to.id)}`;
  const { info } = !to.id ? { info: {} } : (known.get(to.id) ?? (await ask(path).catch(() => ({ info: {} }))));
  if (current.id !== to.id || current.picture !== to.picture) return;
  const texts = captions(info);
  shown.alt = texts[0] ?? to.id ?? "the picture that you gave";
  by("captions").replaceChildren(...texts.map((caption, i) => make("p", i ? "other" : "", caption)));
  for (const [name, value] of Object.entries(to.id ? { id: to.id, ...info } : {}))
    if (!name.startsWith("caption")) by("info").append(make("dt", "", name), make("dd", "", String(value)));
  if (!service.can.includes("caption")) return;
  const { caption } = await ask("/v1/caption", { id: to.id, image: dropped.get(to.picture) }).catch(() => ({}));
  if (!caption || current.id !== to.id || current.picture !== to.picture) return;
  by("reply").replaceChildren(make("small", "", "The model says"), caption);
  by("reply").hidden = false;
}

by("question").onsubmit = async (event) => {
  event.preventDefault();
  const question = by("question-text").value.trim();
  if (!question) return;
  const [term, answer] = [make("dt", "", question), make("dd", "", "…")];
  by("answers").prepend(term, answer);
  by("question-text").value = "";
  const { id, picture } = current;
  answer.textContent = await ask("/v1/answer", { id, image: dropped.get(picture), question }).then(
    (body) => body.answer,
    (error) => error.message,
  );
};

async function searchBy(file) {
  if (!file?.type.startsWith("image/")) return;
  go({ text: "", id: null, picture: await keep(file) });
}

// ---- typing, pictures, keys

const typed = (replace) => {
  clearTimeout(typing);
  const words = text.value.trim();
  if (words !== current.text) go({ ...current, text: words }, { replace });
};

by("search").onsubmit = (event) => {
  event.preventDefault();
  typed(false);
};
// While an input method composes a Chinese word, the field holds Latin letters, which are not searched for.
text.oninput = (event) => {
  clearTimeout(typing);
  if (!event.isComposing) typing = setTimeout(typed, 350, Boolean(current.text));
};
text.addEventListener("compositionstart", () => clearTimeout(typing));
text.addEventListener("compositionend", () => (typing = setTimeout(typed, 350, Boolean(current.text))));
by("chip").lastElementChild.onclick = () => {
  go({ ...current, id: null, picture: null });
  text.focus();
};
by("pick").onclick = () => by("file").click();
by("file").onchange = ({ target }) => {
  searchBy(target.files[0]);
  target.value = "";
};
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) event.preventDefault();
  searchBy(file);
});
const carriesFile = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  by("drop").hidden = !carriesFile(event);
});
document.addEventListener("dragleave", (event) => (by("drop").hidden = by("drop").hidden || event.relatedTarget === null));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  by("drop").hidden = true;
  searchBy(event.dataTransfer.files[0]);
});
document.querySelector(".home").onclick = (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go({ text: "", id: null, picture: null });
};

document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey || by("key").open) return;
  const inField = event.target.matches("input");
  if (event.key === "/" && !inField) {
    event.preventDefault();
    text.focus();
    text.select();
  } else if (event.key === "Escape") {
    event.preventDefault();
    if (event.target === by("question-text")) by("question-text").blur();
    else if (event.target === text && text.value) go({ ...current, text: (text.value = "") });
    else if (current.id || current.picture) go({ ...current, id: null, picture: null });
    else if (current.text) go({ text: "", id: null, picture: null });
  } else if (event.target === text && event.key === "ArrowDown") {
    event.preventDefault();
    grid.querySelector(".tile")?.focus();
  } else if (event.target.matches(".tile")) move(event);
});

function move(event) {
  const tiles = [...grid.querySelectorAll(".tile")];
  const columns = tiles.findIndex((other) => other.offsetTop > tiles[0].offsetTop);
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -Infinity, End: Infinity };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const at = tiles.indexOf(event.target);
  if (event.key === "ArrowUp" && at < columns) return text.focus();
  const to = tiles[Math.max(0, Math.min(tiles.length - 1, at + steps[event.key]))];
  event.target.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
  if (tiles.indexOf(to) + 2 * columns >= tiles.length) more();
}

// ---- the key

function openKey() {
  if (!by("key").open) by("key").showModal();
}
by("key").oncancel = (event) => event.preventDefault();
by("key").firstElementChild.onsubmit = async (event) => {
  event.preventDefault();
  const answer = await fetch("/session", { method: "POST", headers: { authorization: `Bearer ${by("token").value}` } });
  by("refused").textContent = answer.ok ? "" : "That is not a key of this service.";
  if (!answer.ok) return;
  by("key").close();
  start();
};

// ---- beginning

problem.lastElementChild.onclick = () => start();
const atEnd = () => by("end").getBoundingClientRect().top < innerHeight + 600;
new IntersectionObserver(([entry]) => entry.isIntersecting && more(), { rootMargin: "600px" }).observe(by("end"));
addEventListener("popstate", () => show(fromAddress()));

// By the languages of the captions in training.
const HINTS = {
  en: ["Type in English", "Describe a picture", "what is in it?"],
  zh: ["Type in Chinese", "用中文描述图片", "图里有什么？"],
  "en,zh": ["Type in English or Chinese", "Describe a picture · 用中文也行", "what is in it? · 图里有什么？"],
};

function hint(languages) {
  const hints = HINTS[languages.join()];
  if (hints) [by("language").textContent, text.placeholder, by("question-text").placeholder] = hints;
}

async function start() {
  if (!dropped.size) restorePictures();
  service = await ask("/health").catch(() => service);
  hint(service.languages);
  by("report").hidden = !service.report;
  if (service.key) return openKey();
  current = {};
  show(fromAddress());
}
start();

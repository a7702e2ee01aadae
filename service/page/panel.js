/** A panel: asks the service and shows the answer, or kindly why there is none. */

import { Refusal, curl } from "./service.js";

const TITLES = {
  0: "No answer",
  401: "The key was not accepted",
  403: "The key was not accepted",
  408: "Too slow",
  413: "Too large",
  429: "Not enough images left",
  503: "Busy right now",
  504: "Too slow",
};
const NOBODY =
  "The server did not answer. It may be down or out of reach, or the pictures may be more than it takes.";
const PERCENT = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 4 });

/** Return the first element of a template's copy. */
export function fromTemplate(id) {
  return document.getElementById(id).content.cloneNode(true).firstElementChild;
}

/** Return a confidence as text; nothing when the policy leaves it out. */
export function percent(value) {
  return value === undefined ? "" : PERCENT.format(value);
}

export class Panel {
  #root;
  #service;
  #output;
  #request = null;
  #addresses = [];

  /** @param {Element} root Has an element with role `status` and one of class `output`. */
  constructor(root, service) {
    this.#root = root;
    this.#service = service;
    this.#output = root.querySelector(".output");
  }

  /**
   * Ask about pictures; a later call overtakes an earlier one.
   *
   * @param {Picture[]} pictures What to send.
   * @param {(predictions: object[]) => Element[]} render Returns what to show of the answer.
   */
  async ask(pictures, render) {
    this.#request?.abort();
    const request = (this.#request = new AbortController());
    this.#root.setAttribute("aria-busy", "true");
    try {
      const { reply, latency } = await this.#service.classify(pictures, request.signal);
      this.#replace([...render(reply.predictions), this.#record(pictures, reply, latency)]);
      const said = reply.predictions.map(({ label, confidence }) => `${label} ${percent(confidence)}`.trim());
      this.#say(`Answer: ${said.join(", ")}`);
    } catch (error) {
      if (request.signal.aborted) return;
      if (!(error instanceof Refusal)) throw error;
      this.#say("");
      this.#replace([refusal(error, () => this.ask(pictures, render))]);
    } finally {
      if (this.#request === request) this.#root.removeAttribute("aria-busy");
    }
  }

  /** Show nothing, and drop what is under way. */
  clear() {
    this.#request?.abort();
    this.#replace([]);
    this.#say("");
  }

  /** Show a message instead of an answer. */
  tell(text) {
    this.clear();
    const message = document.createElement("p");
    message.className = "empty";
    message.textContent = text;
    this.#replace([message]);
  }

  /** Return an address for a picture that holds until the panel shows something else. */
  addressOf(picture) {
    const address = URL.createObjectURL(picture.blob);
    this.#addresses.push(address);
    return address;
  }

  #replace(elements) {
    const gone = new Set(this.#addresses);
    this.#output.replaceChildren(...elements);
    for (const shown of this.#output.querySelectorAll("[src], [href]")) gone.delete(shown.src ?? shown.href);
    for (const address of gone) URL.revokeObjectURL(address);
    this.#addresses = this.#addresses.filter((address) => !gone.has(address));
  }

  #say(text) {
    this.#root.querySelector("[role=status]").textContent = text;
  }

  #record(pictures, reply, latency) {
    const record = fromTemplate("record");
    const many = pictures.length === 1 ? "1 image" : `${pictures.length} images`;
    record.querySelector(".facts").textContent = `${many} in ${latency.toFixed(0)} ms, measured in this browser`;
    const command = curl(pictures, this.#service.key !== "");
    record.querySelector("code").textContent = command;
    const copy = record.querySelector("button");
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(command);
      copy.textContent = "Copied";
      this.#say("Copied");
    });
    copy.hidden = !navigator.clipboard; // it exists only over HTTPS and on this machine
    for (const picture of pictures.filter(({ made }) => made)) {
      const link = Object.assign(document.createElement("a"), { href: this.addressOf(picture), download: picture.name });
      link.textContent = `Save ${picture.name}`;
      record.querySelector(".save").append(link, " for that command.");
      record.querySelector(".save").hidden = false;
    }
    record.querySelector(".raw").textContent = JSON.stringify(reply, null, 2);
    return record;
  }
}

/** Return the rows of a score table, label, bar and percentage, from `[label, score, text?]`. */
export function scoreRows(scores, winner) {
  return scores.map(([label, score, text]) => {
    const row = document.createElement("tr");
    const [name, bar, value] = ["th", "td", "td"].map((tag) => row.appendChild(document.createElement(tag)));
    name.scope = "row";
    name.textContent = label;
    bar.className = "bar";
    bar.appendChild(document.createElement("span")).style.setProperty("inline-size", `${100 * score}%`);
    value.textContent = text ?? percent(score);
    row.classList.toggle("winner", label === winner);
    return row;
  });
}

/** Return the card of one prediction, with at most `most` scores; `truth`, when it is known, is what the picture shows. */
export function card(prediction, address, { alt, truth }, most = 5) {
  const element = fromTemplate("card");
  Object.assign(element.querySelector("img"), { src: address, alt });
  const verdict = element.querySelector(".truth");
  verdict.hidden = !truth;
  verdict.classList.add(prediction.label === truth ? "good" : "bad");
  verdict.textContent = prediction.label === truth ? "right" : `wrong: CIFAR-10 calls it ${truth}`;
  element.querySelector(".label").textContent = prediction.label;
  element.querySelector(".sure").textContent = percent(prediction.confidence);
  element.querySelector("caption").textContent = `The largest scores of ${alt}`;
  const scores = Object.entries(prediction.scores ?? {}).slice(0, most);
  element.querySelector("tbody").append(...scoreRows(scores, prediction.label));
  element.querySelector("table").hidden = scores.length === 0;
  element.querySelector(".hidden-scores").hidden = scores.length > 0;
  return element;
}

function refusal(error, again) {
  const element = fromTemplate("refusal");
  const isOurs = error.status >= 500 || error.status === 0;
  element.querySelector("h3").textContent = TITLES[error.status] ?? (isOurs ? "Something went wrong" : "That did not work");
  element.querySelector(".detail").textContent = sentence(error.message) || NOBODY;
  element.querySelector(".when").textContent = error.retryAfter ? `Try again ${moment(error.retryAfter)}.` : "";
  element.querySelector("button").addEventListener("click", again);
  element.querySelector("button").hidden = [400, 413, 415, 422].includes(error.status); // the same would fail again
  return element;
}

function sentence(text) {
  return text && `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}

function moment(seconds) {
  if (seconds < 5) return "in a moment";
  const far = seconds > 12 * 3600;
  const time = new Date(Date.now() + 1000 * seconds);
  const said = time.toLocaleTimeString("en", { hour: "2-digit", minute: "2-digit", ...(far ? { weekday: "long" } : { second: "2-digit" }) });
  return `${far ? "on" : "at"} ${said}`;
}

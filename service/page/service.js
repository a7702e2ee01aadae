/** The service's HTTP API: what is asked, what comes back, what is left of the quota, and the same with curl. */

/** A request without an answer. `status` is 0 when nobody answered; `retryAfter` is in seconds, 0 when not said. */
export class Refusal extends Error {
  constructor(status, detail, retryAfter = 0) {
    super(detail);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export class Service {
  /** Sent with every request when it is not empty; never stored. */
  key = "";
  /** Called with `[{window, limit, remaining, resetAt}]` whenever a reply says what is left; `resetAt` as `Date.now()`. */
  onquota = () => {};

  /** Return what `GET /v1/model` says. */
  async model() {
    const model = await this.#send("v1/model", {});
    this.onquota(model.quota.map((level) => ({ ...level, resetAt: later(level.reset_s) })));
    return model;
  }

  /** Return the reply for pictures, with the milliseconds that it took as `latency`; throws a Refusal. */
  async classify(pictures, signal) {
    const body = new FormData();
    for (const picture of pictures) body.append("file", picture.blob, picture.name);
    const started = performance.now();
    const reply = await this.#send("v1/classify", { method: "POST", body, signal });
    return { reply, latency: performance.now() - started };
  }

  async #send(path, options) {
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new Refusal(0, "");
    }
    const levels = quotaOf(response.headers);
    if (levels.length) this.onquota(levels);
    const body = await response.json().catch(() => null); // a proxy in between may answer with anything
    if (response.ok && body) return body;
    const retryAfter = Number(response.headers.get("Retry-After")) || 0;
    throw new Refusal(response.status, body?.detail ?? `The server answered with status ${response.status}.`, retryAfter);
  }
}

/** Read `RateLimit-Policy: "minute";q=60;w=60` and `RateLimit: "minute";r=58;t=43`. */
function quotaOf(headers) {
  const read = (name) => {
    const items = (headers.get(name) ?? "").matchAll(/"([^"]+)"((?:;\w+=\d+)*)/g);
    return [...items].map(([, window, rest]) => {
      const values = [...rest.matchAll(/;(\w+)=(\d+)/g)].map(([, key, value]) => [key, Number(value)]);
      return { window, ...Object.fromEntries(values) };
    });
  };
  const limits = new Map(read("RateLimit-Policy").map(({ window, q }) => [window, q]));
  return read("RateLimit")
    .filter(({ window }) => limits.has(window))
    .map(({ window, r, t }) => ({ window, limit: limits.get(window), remaining: r, resetAt: later(t) }));
}

/** Return what `Date.now()` will be in so many seconds; a window that never ends names none. */
function later(seconds) {
  return seconds == null ? Infinity : Date.now() + 1000 * seconds;
}

/** Return the shell commands that ask the same; the key is left to `$PALISADE_API_KEY`. */
export function curl(pictures, withKey) {
  const address = new URL("v1/classify", document.baseURI).href;
  const fetched = pictures.filter((picture) => picture.address).map((picture) => `curl -s -O ${quote(picture.address)}`);
  const words = ["curl -s"];
  if (withKey) words.push('-H "Authorization: Bearer $PALISADE_API_KEY"');
  for (const { name } of pictures) words.push(`-F ${quote(`file=@${/[;,"\\]/.test(name) ? JSON.stringify(name) : name}`)}`);
  words.push(quote(address));
  const command = words.join(" ");
  return [...fetched, command.length > 90 ? words.join(" \\\n  ") : command].join("\n");
}

function quote(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

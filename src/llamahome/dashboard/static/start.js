// Starting a training: uploads a file, and renews the answers of commands while they run. Without this script the page is renewed by hand.
import { bytes } from "./format.js";

const MILLISECONDS = 700;
const upload = document.getElementById("upload");
const file = document.getElementById("file");
const said = document.getElementById("uploaded");

if (upload) {
  upload.hidden = false;
  file.addEventListener("change", () => file.files.length && send(file.files[0]));
}

function send(chosen) {
  if (chosen.size > Number(upload.dataset.most)) {
    said.textContent = `${chosen.name} is larger than ${bytes(Number(upload.dataset.most))}; type its path instead.`;
    return;
  }
  const request = new XMLHttpRequest();
  request.upload.addEventListener("progress", ({ loaded, total }) => {
    said.textContent = `${bytes(loaded)} of ${bytes(total)}`;
  });
  request.addEventListener("load", () => {
    if (request.status === 201) {
      const { path } = JSON.parse(request.responseText);
      document.getElementById("data").value = path;
      said.textContent = `${bytes(chosen.size)} are now in ${path}`;
    } else {
      said.textContent = `It is not taken: ${request.responseText.trim() || request.status}`;
    }
  });
  request.addEventListener("error", () => {
    said.textContent = "The server does not answer, or does not take the file.";
  });
  request.open("POST", `/start/upload?${new URLSearchParams({ name: chosen.name })}`);
  request.setRequestHeader("content-type", "application/octet-stream");
  request.send(chosen);
}

// The page as the server writes it now, in place of the part that shows answers; the form keeps what is being typed.
async function renew() {
  const shown = document.getElementById("results");
  if (!shown?.hasAttribute("data-running")) return;
  try {
    const answer = await fetch(location.href);
    if (answer.redirected) {
      location.replace(answer.url);
      return;
    }
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const fresh = page.getElementById("results");
    if (fresh && answer.ok) put(shown, fresh);
  } catch {
    // the server has ended; what is shown stays, and a training goes on
  }
  setTimeout(renew, MILLISECONDS);
}

// Only what differs is replaced, so that a text that somebody reads or selects stays.
function put(shown, fresh) {
  if (shown.outerHTML === fresh.outerHTML) return;
  const scrolled = [...shown.querySelectorAll("pre")].map((each) => each.scrollTop + each.clientHeight >= each.scrollHeight - 4);
  shown.replaceWith(fresh);
  [...fresh.querySelectorAll("pre")].forEach((each, at) => {
    if (scrolled[at] !== false) each.scrollTop = each.scrollHeight;
  });
}

setTimeout(renew, MILLISECONDS);

// The served page: asks for its sections whenever the server says that the run's files have changed. Switches stay as they are.
{
  const tag = document.getElementById("live");
  const say = (text, good) => { tag.textContent = text; tag.classList.toggle("good", good); };
  let wanted = 0, shown = 0, busy = false;
  const update = async () => {
    if (busy || wanted === shown) return;
    busy = true;
    const version = wanted;
    try {
      const answer = await fetch("/main", { cache: "no-store" });
      if (answer.ok) {
        document.querySelector("main").innerHTML = await answer.text();
        hover();
        shown = version;
      }
    } catch { /* The events say when the server is there again. */ }
    busy = false;
    if (wanted !== version) update();
  };
  const events = new EventSource("/events");
  events.onopen = () => say("live", true);
  events.onerror = () => say("no answer: ringtune watch has ended", false);
  events.onmessage = (event) => {
    const [version, state, since] = event.data.split(" ");
    if (state === "gone" || state === "silent") {
      const at = new Date(1000 * since), today = at.toDateString() === new Date().toDateString();
      const clock = at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });
      const when = today ? clock : `${at.toLocaleDateString()} ${clock}`;
      say(`no news since ${when}${state === "gone" ? ", the process is gone" : ""}`, false);
    } else {
      say(state === "over" ? "ended" : "live", state !== "over");
    }
    wanted = version;
    update();
  };
}

//! The report as a browser shows it: hovering, switches, the width of a phone, dark, paper, and the same page served while a run goes on.

use std::fs;

use serde_json::{Value, json};

use crate::browser::Browser;
use crate::program::Workplace;
use crate::report::{place, sft};
use crate::watch::Watch;
use ringtune::train::holder::Holder;

/// A page's picture, a folder for whoever wants to look at it being named.
fn picture(browser: &Browser, name: &str) -> Vec<u8> {
    let height = browser.js("return document.documentElement.scrollHeight").as_f64().unwrap();
    let width = browser.js("return window.innerWidth").as_f64().unwrap();
    let clip = json!({"x": 0, "y": 0, "width": width, "height": height, "scale": 1});
    let shot = browser.chromium("Page.captureScreenshot", json!({"captureBeyondViewport": true, "clip": clip}));
    kept(&shot, name)
}

fn kept(answer: &Value, name: &str) -> Vec<u8> {
    let bytes = base64(answer["data"].as_str().unwrap());
    if let Some(dir) = std::env::var_os("RINGTUNE_PICTURES") {
        fs::write(std::path::Path::new(&dir).join(name), &bytes).unwrap();
    }
    bytes
}

fn base64(text: &str) -> Vec<u8> {
    let digit =
        |c: u8| b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".iter().position(|&d| d == c);
    let mut out = Vec::new();
    for four in text.as_bytes().chunks(4) {
        let digits: Vec<usize> = four.iter().filter_map(|&c| digit(c)).collect();
        let bits = digits.iter().fold(0, |all, d| all << 6 | d) << (6 * (4 - digits.len()));
        out.extend((0..digits.len() - 1).map(|i| (bits >> (16 - 8 * i)) as u8));
    }
    out
}

/// Nothing stands out of the page's width, but in what can be scrolled by itself.
fn fits(browser: &Browser) {
    let found = browser.js(
        "const wide = [...document.querySelectorAll('body *')].filter(e => {
            const box = e.getBoundingClientRect();
            return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1) && !e.closest('.scroll') && !e.closest('#tip')
                && !e.classList.contains('toggle');
         });
         return [document.documentElement.scrollWidth, innerWidth, wide.map(e => e.tagName + '.' + e.getAttribute('class'))];",
    );
    assert!(found[0].as_f64() <= found[1].as_f64() && found[2] == json!([]), "{found}");
}

/// Where a value of a chart that is shown stands in the window, after scrolling there.
fn place_in(browser: &Browser, key: &str, x: f64) -> (f64, f64) {
    let found = browser.js(&format!(
        "const svg = [...document.querySelectorAll('svg[data-key={key}]')].find(s => s.getBoundingClientRect().width > 0);
         svg.scrollIntoView({{block: 'center'}});
         const box = svg.getBoundingClientRect(), [x0, x1] = svg.dataset.values.split(',').map(Number);
         const [left, right] = svg.dataset.frame.split(',').map(Number);
         const across = left + ({x} - x0) / (x1 - x0) * (right - left);
         return [box.left + across * box.width / svg.viewBox.baseVal.width, box.top + box.height / 2];"
    ));
    (found[0].as_f64().unwrap(), found[1].as_f64().unwrap())
}

fn tip(browser: &Browser) -> String {
    let shown = "const tip = document.getElementById('tip'); return tip.style.display === 'block' ? tip.innerText : ''";
    browser.js(shown).as_str().unwrap().to_string()
}

/// Runs with a spike, a skipped step, several data sets and answers, so that every section is there.
fn reports() -> Workplace {
    let w = place();
    sft(&w, "out", &["--do_gen_test", "--num_gen_samples", "2", "--max_new_tokens", "5", "--lora_r", "4"]);
    let mut lines = String::new();
    for step in 1..=400u32 {
        let (x, wave) = (f64::from(step), f64::from(step * 37 % 11) / 40.0);
        let loss = if step == 250 { 60.0 } else { 1.5 + 2.5 / (1.0 + x / 40.0) + wave };
        let lr = 2e-4 * (1.0 - x / 400.0);
        lines += &json!({
            "step": step, "epoch": x / 200.0, "loss": loss, "grad_norm": 0.5 + wave, "lr": lr, "tokens": 8192, "supervised": 5000 + step,
            "ms": 100.0 + wave, "tokens_per_second": 81_000.0 + 100.0 * wave,
        })
        .to_string();
        lines += "\n";
        if step % 50 == 0 {
            lines += &format!(
                "{}\n",
                json!({"step": step, "eval_loss": 1.6 + 2.0 / (1.0 + x / 40.0), "eval_mean_token_accuracy": 0.5 + x / 2000.0,
                    "eval_chat_loss": 1.5 + 2.0 / (1.0 + x / 40.0), "eval_code_loss": 1.8 + 2.0 / (1.0 + x / 30.0)})
            );
        }
    }
    fs::rename(w.path("out"), w.path("small")).unwrap();
    for name in ["long", "other/long"] {
        w.write(&format!("{name}/metrics.jsonl"), &lines);
        for file in ["run.json", "samples.json", "trainer_state.json"] {
            w.write(&format!("{name}/{file}"), fs::read(w.path("small").join(file)).unwrap());
        }
    }
    for (dirs, to) in [
        (vec!["small"], "small.html"),
        (vec!["long"], "long.html"),
        (vec!["small", "long", "other/long"], "three.html"),
    ] {
        let words = [vec!["report"], dirs, vec!["--output", to]].concat();
        assert_eq!(w.run(&words).code, Some(0));
    }
    w
}

#[test]
fn a_report_is_read_hovered_switched_and_printed() {
    let Some(browser) = Browser::start() else { return };
    let w = reports();
    for file in ["small", "long", "three"] {
        browser.open(&format!("file://{}", w.path(&format!("{file}.html")).display()));
        for (width, scheme) in [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")] {
            browser.look(width, scheme, "screen");
            fits(&browser);
            let heights = browser.js(
                "return [...document.querySelectorAll('svg.chart')].map(s => [s.dataset.key, s.getBoundingClientRect().height])
                    .filter(s => s[1] > 0).sort((a, b) => b[1] - a[1])",
            );
            assert_eq!(heights[0][0], "loss", "{width}: {heights}");
            let letters = browser.js(
                "return Math.min(...[...document.querySelectorAll('.tick')].map(t => t.getBoundingClientRect().height).filter(h => h > 0))",
            );
            assert!(letters.as_f64() > Some(11.0), "letters {letters} high at {width}");
            let shot = picture(&browser, &format!("{file}-{width}-{scheme}.png"));
            assert!(shot.starts_with(b"\x89PNG") && shot.len() > 20_000, "{} bytes", shot.len());
            let ground = browser.js("return getComputedStyle(document.body).backgroundColor");
            assert_eq!(ground, if scheme == "dark" { "rgb(15, 18, 22)" } else { "rgb(246, 247, 249)" });
        }
        browser.look(718, "dark", "print");
        paper(&browser, file);
    }
    // Hovering, with the mouse, at the width of a desk.
    browser.open(&format!("file://{}", w.path("long.html").display()));
    browser.look(1280, "light", "screen");
    assert_eq!(tip(&browser), "");
    let (x, y) = place_in(&browser, "loss", 250.0);
    browser.move_to(x, y);
    let said = tip(&browser);
    assert!(said.starts_with("step") && said.contains("250") && said.contains("60.000 (mean "), "{said}");
    assert!(said.contains("validation") && said.contains("1.87"), "{said}");
    assert_eq!(browser.js("return document.querySelectorAll('.cursor').length"), 1);
    browser.move_to(x, 5.0);
    assert_eq!(tip(&browser), "");
    // By tokens the same place has another name.
    let visible =
        "[...document.querySelectorAll('svg[data-key=loss]')].filter(s => s.getBoundingClientRect().width > 0)";
    let across = |axis: &str| assert_eq!(browser.js(&format!("return {visible}.map(s => s.dataset.x)")), json!([axis]));
    let click = |id: &str| browser.js(&format!("document.querySelector('label[for={id}]').click()"));
    across("step");
    click("x-tokens");
    across("tokens");
    let (x, y) = place_in(&browser, "loss", 250.0 * 8192.0);
    browser.move_to(x, y);
    assert!(tip(&browser).contains("2,048,000"), "{}", tip(&browser));
    click("x-step");
    let seen = |what: &str| {
        browser.js(&format!(
            "return [...document.querySelectorAll('{what}')].filter(e => e.getBoundingClientRect().width > 0).length"
        ))
    };
    let (means, all, rows) = (seen("path.mean"), seen("path.raw"), seen(".settings tbody tr").as_u64().unwrap());
    assert!(means.as_u64() > Some(0) && means == all && rows > 5, "{means} {all} {rows}");
    click("mean");
    click("only");
    assert_eq!((seen("path.mean"), seen("path.raw")), (json!(0), all));
    assert!(seen(".settings tbody tr").as_u64().unwrap() > 2 * rows, "settings that nobody set come with the switch");
    // A run of several that is switched off is in no chart and no tooltip.
    browser.open(&format!("file://{}", w.path("three.html").display()));
    assert_eq!(seen(".charts .r1").as_u64().map(|n| n > 0), Some(true));
    click("run-1");
    assert_eq!(seen(".charts .r1"), 0);
    let (x, y) = place_in(&browser, "loss", 4.0);
    browser.move_to(x, y);
    let said = tip(&browser);
    let name = |dir: &str| dir.to_string();
    assert!(
        said.contains("small training") && said.contains(&name("other/long")) && !said.contains("\nlong"),
        "{said}"
    );
    assert_eq!(browser.console(), Vec::<String>::new());
}

/// On paper: A4, light, no switches, nothing beyond the width, no row of a table on two pages.
fn paper(browser: &Browser, file: &str) {
    let found = browser.js(
        "const rows = [...document.querySelectorAll('tr, .figures > div')];
         return {
            ground: getComputedStyle(document.body).backgroundColor,
            bar: getComputedStyle(document.querySelector('.bar')).display,
            wide: [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90)),
            hidden: [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 90)),
            cut: rows.filter(r => getComputedStyle(r).breakInside !== 'avoid' || r.getBoundingClientRect().height > 900).length,
            headers: [...document.querySelectorAll('thead')].filter(h => getComputedStyle(h).display !== 'table-header-group').length,
            height: document.documentElement.scrollHeight,
         };",
    );
    assert_eq!((&found["bar"], &found["ground"]), (&json!("none"), &json!("rgb(255, 255, 255)")), "{found}");
    assert_eq!((&found["wide"], &found["hidden"]), (&json!([]), &json!([])), "{file}: {found}");
    assert_eq!((&found["cut"], &found["headers"]), (&json!(0), &json!(0)), "{found}");
    let printed = browser.chromium("Page.printToPDF", json!({"preferCSSPageSize": true, "printBackground": true}));
    let pdf = kept(&printed, &format!("{file}.pdf"));
    let text = String::from_utf8_lossy(&pdf);
    assert!(text.starts_with("%PDF"));
    let pages = text.matches("/Type /Page\n").count();
    assert!(text.matches("/MediaBox [0 0 594.95996 841.91998]").count() >= pages.min(1), "it is not A4");
    // As many pages as the page is long, and some air before what may not be cut.
    let least = found["height"].as_f64().unwrap() / 1017.0;
    assert!(
        pages as f64 >= least.floor() && (pages as f64) < 1.5 * least + 2.0,
        "{file}: {pages} pages, {least:.1} are filled"
    );
}

#[test]
fn a_served_page_follows_its_run() {
    let Some(browser) = Browser::start() else { return };
    let w = Workplace::new();
    let line = |step: u32| json!({"step": step, "loss": 3.0 + 1.0 / f64::from(step), "lr": 1e-4, "tokens": 10, "supervised": 5});
    let lines = |steps: std::ops::RangeInclusive<u32>| steps.map(|s| format!("{}\n", line(s))).collect::<String>();
    w.write("run/.lock", "process 1 on here\n");
    w.write("run/metrics.jsonl", lines(1..=5));
    let watch = Watch::start(&w, &["run", "--port", "0"]);
    browser.open(&watch.url);
    browser.look(1280, "light", "screen");
    let state =
        |text: &str| browser.wait_for(&format!("return document.getElementById('live').textContent === '{text}'"));
    let steps =
        |n: u32| browser.wait_for(&format!("return document.querySelector('.figures dd').textContent === '{n}'"));
    state("live");
    steps(5);
    browser.js("document.querySelector('label[for=x-tokens]').click()");
    w.write("run/metrics.jsonl", lines(1..=9));
    steps(9);
    // What was switched stays, and the charts that came can be hovered.
    assert_eq!(browser.js("return document.getElementById('x-tokens').checked"), true);
    let (x, y) = place_in(&browser, "loss", 90.0);
    browser.move_to(x, y);
    assert!(tip(&browser).contains("90") && tip(&browser).contains("3.111"), "{}", tip(&browser));
    // The run is taken up again from an earlier step, then it ends.
    w.write("run/metrics.jsonl", lines(1..=3));
    steps(3);
    fs::remove_file(w.path("run/.lock")).unwrap();
    state("ended");
    // Another one, whose process is gone: this one's number and another's beginning.
    let me = Holder::me().record();
    w.write("run/.lock", me.replacen(me.split(' ').nth(4).unwrap(), "1", 1));
    browser.wait_for(
        "return /^no news since \\d\\d:\\d\\d, the process is gone$/.test(document.getElementById('live').textContent)",
    );
    browser.wait_for("return document.querySelector('ul.notes').textContent.includes('the process is gone (process ')");
    fs::remove_file(w.path("run/.lock")).unwrap();
    state("ended");
    assert_eq!(browser.console(), Vec::<String>::new());
    assert_eq!(watch.interrupt(), Some(0));
    state("no answer: ringtune watch has ended");
}

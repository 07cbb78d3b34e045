//! A headless Chromium, driven through chromedriver (W3C WebDriver, and Chromium's own commands where that has none).

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::skip::skipped;

/// A browser with one page; it ends with its value.
pub struct Browser {
    driver: Child,
    agent: ureq::Agent,
    session: String,
    _profile: TempDir,
}

fn found(name: &str) -> Option<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|p| p.is_file()).map(|p| p.display().to_string())
}

/// Whether the system's package manager could bring what is missing: a machine whose distribution has no such package lacks nothing
/// that it should have.
fn could_be_there() -> bool {
    let policy = Command::new("apt-cache").args(["policy", "chromium", "chromium-driver"]).output();
    let text = policy.map_or(String::new(), |o| String::from_utf8_lossy(&o.stdout).into_owned());
    text.lines().filter(|l| l.contains("Candidate:") && !l.contains("(none)")).count() == 2
}

impl Browser {
    /// Starts one, or says why this test is skipped.
    pub fn start() -> Option<Self> {
        let chromium = ["chromium", "chromium-browser", "google-chrome"].into_iter().find_map(found);
        let (Some(chromium), Some(chromedriver)) = (chromium, found("chromedriver")) else {
            skipped("there is no chromium with chromedriver", could_be_there());
            return None;
        };
        let profile = tempfile::tempdir().unwrap();
        let mut driver = Command::new(chromedriver)
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver starts");
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let port = line.split("successfully on port ").nth(1)?;
            Some(port.trim_end_matches('.').to_string())
        });
        let port = port.expect("chromedriver names its port");
        std::thread::spawn(move || lines.for_each(drop));
        let config = ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build();
        let agent = ureq::Agent::from(config);
        let arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
            &format!("--user-data-dir={}", profile.path().display()),
        ];
        let mut this = Self { driver, agent, session: format!("http://127.0.0.1:{port}/session"), _profile: profile };
        let started = this.post(
            "",
            &json!({"capabilities": {"alwaysMatch": {
                "goog:chromeOptions": {"binary": chromium, "args": arguments},
                "goog:loggingPrefs": {"browser": "ALL"},
            }}}),
        );
        this.session += &format!("/{}", started["sessionId"].as_str().expect("a session has an id"));
        Some(this)
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let url = format!("{}{path}", self.session);
        let request = self.agent.post(&url).header("content-type", "application/json; charset=utf-8");
        let mut answer = request.send(body.to_string()).unwrap();
        let text = answer.body_mut().with_config().limit(64 << 20).read_to_string().unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert!(answer.status().is_success(), "{path} {body}: {text}");
        value["value"].clone()
    }

    /// Opens an address.
    pub fn open(&self, url: &str) {
        self.post("/url", &json!({"url": url}));
    }

    /// What a body of JavaScript returns.
    pub fn js(&self, body: &str) -> Value {
        self.post("/execute/sync", &json!({"script": body, "args": []}))
    }

    /// Waits until a body of JavaScript returns something true, and gives that.
    pub fn wait_for(&self, body: &str) -> Value {
        let start = Instant::now();
        loop {
            let value = self.js(body);
            if !matches!(&value, Value::Null | Value::Bool(false)) {
                return value;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "never true: {body}");
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// A command of Chromium's own (chromedevtools.github.io/devtools-protocol).
    pub fn chromium(&self, command: &str, parameters: Value) -> Value {
        self.post("/goog/cdp/execute", &json!({"cmd": command, "params": parameters}))
    }

    /// Makes the page this wide, in light or dark, on a screen or on paper.
    pub fn look(&self, width: u32, scheme: &str, media: &str) {
        let size = json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700});
        self.chromium("Emulation.setDeviceMetricsOverride", size);
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.chromium("Emulation.setEmulatedMedia", json!({"media": media, "features": features}));
    }

    /// Moves the mouse to a place of the window.
    pub fn move_to(&self, x: f64, y: f64) {
        let to = json!({"type": "pointerMove", "duration": 0, "x": x.round(), "y": y.round(), "origin": "viewport"});
        let mouse = json!({"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [to]});
        self.post("/actions", &json!({"actions": [mouse]}));
    }

    /// What the console has said since this was asked last.
    pub fn console(&self) -> Vec<String> {
        let said = self.post("/se/log", &json!({"type": "browser"}));
        said.as_array().unwrap().iter().map(|line| line["message"].to_string()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.agent.delete(&self.session).call();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

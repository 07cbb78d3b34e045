//! Requests to an MLflow server: where it is, who asks, and what an answer means.

use std::time::Duration;

use serde_json::Value;
use ureq::{Body, http::Response};

use crate::error::{Context, Error, Result};
use crate::hub::Network;

/// How long a connection may take, and a whole request.
const CONNECT: Duration = Duration::from_secs(5);
const REQUEST: Duration = Duration::from_secs(15);
/// Longest answer that is read.
const LONGEST: u64 = 1 << 20;

/// Why a request failed.
#[derive(Debug)]
pub enum Failure {
    /// It may succeed later.
    Later(String),
    /// It will not.
    Never(String),
}

/// A server, as the environment names it.
pub struct Server {
    network: Network,
    /// Its address without a final slash.
    pub uri: String,
    /// Name of the experiment.
    pub experiment: String,
    authorization: Option<String>,
}

fn var(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

impl Server {
    /// `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `MLFLOW_TRACKING_TOKEN` or `MLFLOW_TRACKING_USERNAME` and `_PASSWORD`.
    ///
    /// # Errors
    /// A usage error where no server is named.
    pub fn from_env() -> Result<Self> {
        let uri = var("MLFLOW_TRACKING_URI");
        let server = uri.as_deref().filter(|u| u.starts_with("http://") || u.starts_with("https://"));
        let Some(server) = server else {
            let found = uri.map_or("nothing".into(), |u| format!("{u:?}"));
            return Err(Error::usage(format!(
                "--report-to mlflow: MLFLOW_TRACKING_URI: expected the address of a server, such as http://127.0.0.1:5000 (`mlflow server` starts one), found {found}"
            )));
        };
        let authorization = match (var("MLFLOW_TRACKING_TOKEN"), var("MLFLOW_TRACKING_USERNAME")) {
            (Some(token), _) => Some(format!("Bearer {token}")),
            (None, Some(user)) => {
                let password = var("MLFLOW_TRACKING_PASSWORD").unwrap_or_default();
                Some(format!("Basic {}", base64(format!("{user}:{password}").as_bytes())))
            }
            _ => None,
        };
        let network = Network::from_env(Some("MLFLOW_TRACKING_SERVER_CERT_PATH"), |client| {
            client
                .http_status_as_error(false)
                .timeout_connect(Some(CONNECT))
                .timeout_global(Some(REQUEST))
                .user_agent(concat!("ringtune/", env!("CARGO_PKG_VERSION")))
        })
        .context(|| "--report-to mlflow".to_string())?;
        Ok(Self {
            network,
            uri: server.trim_end_matches('/').to_string(),
            experiment: var("MLFLOW_EXPERIMENT_NAME").unwrap_or_else(|| "Default".into()),
            authorization,
        })
    }

    /// The run that `MLFLOW_RUN_ID` names.
    pub fn run_of_env(&self) -> Option<String> {
        var("MLFLOW_RUN_ID")
    }

    fn url(&self, path: &str) -> String {
        format!("{}/api/2.0/mlflow/{path}", self.uri)
    }

    /// Sends a JSON object.
    ///
    /// # Errors
    /// What the server says, or why it says nothing.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let url = self.url(path);
        let mut request = self.agent(&url)?.post(&url).header("content-type", "application/json");
        if let Some(who) = &self.authorization {
            request = request.header("authorization", who);
        }
        let answer = request.send(body.to_string()).map_err(|e| self.no_answer(&url, &e))?;
        read(path, answer)
    }

    fn agent(&self, url: &str) -> Result<&ureq::Agent, Failure> {
        self.network.agent(url).map_err(Failure::Never)
    }

    /// What does not pass now may once the network is another: a training is long.
    fn no_answer(&self, url: &str, e: &ureq::Error) -> Failure {
        Failure::Later(self.network.no_answer(url, e).why)
    }

    /// The id of an experiment; `None` where there is none of this name.
    ///
    /// # Errors
    /// As [`Server::post`].
    pub fn experiment_by_name(&self, name: &str) -> Result<Option<String>, Failure> {
        let path = "experiments/get-by-name";
        let url = self.url(path);
        let mut request = self.agent(&url)?.get(&url).query("experiment_name", name);
        if let Some(who) = &self.authorization {
            request = request.header("authorization", who);
        }
        let answer = request.call().map_err(|e| self.no_answer(&url, &e))?;
        if answer.status().as_u16() == 404 {
            return Ok(None);
        }
        let found = read(path, answer)?;
        let id = found.pointer("/experiment/experiment_id").and_then(Value::as_str).map(String::from);
        id.map(Some).ok_or_else(|| Failure::Never(format!("{path} gave no experiment_id")))
    }
}

fn read(path: &str, mut answer: Response<Body>) -> Result<Value, Failure> {
    let status = answer.status().as_u16();
    let text = answer.body_mut().with_config().limit(LONGEST).read_to_string();
    let text = text.map_err(|e| Failure::Later(format!("{path}: {e}")))?;
    let value = serde_json::from_str::<Value>(&text).unwrap_or(Value::Null);
    if (200..300).contains(&status) {
        return Ok(value);
    }
    let said = match (value["error_code"].as_str(), value["message"].as_str()) {
        (Some(code), Some(message)) => format!("{code}, {message}"),
        _ => text.chars().take(200).collect(),
    };
    let why = format!("{path}: status {status}: {}", said.trim());
    match status {
        408 | 429 | 500.. => Err(Failure::Later(why)),
        _ => Err(Failure::Never(why)),
    }
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for three in bytes.chunks(3) {
        let bits = three.iter().fold(0u32, |all, &b| all << 8 | u32::from(b)) << (8 * (3 - three.len()));
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i)) as usize % 64];
            out.push(if i <= three.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4648, section 10.
    #[test]
    fn base64_known_answers() {
        for (text, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
            ("a:b\u{ff}", "YTpiw78="),
        ] {
            assert_eq!(base64(text.as_bytes()), expected);
        }
    }
}

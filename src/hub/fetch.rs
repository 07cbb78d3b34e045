//! From a name to files: the hub is asked what there is, what is missing is fetched, the rest comes from the cache.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cache::{Entry, Listing, Store, fits, free_space};
use super::checksum::{Checksum, is_sha256};
use super::client::{Client, Failure};
use super::name::{DataName, Kind, Repo};
use super::refusal::{Asked, kind};
use super::transfer::Transfer;
use super::wanted::{self, INDEX, Part};
use super::{dataset, name::is_commit};
use crate::error::{Context, Error, Result};
use crate::files::{At, create_dir_all, read_text};
use crate::text::{bytes, plural};
use crate::{ensure, say};

/// Longest description of a repository, index or card.
const LONGEST_TEXT: u64 = 256 << 20;

/// The hub, and the cache of what came from it.
pub struct Hub<'a> {
    client: Client,
    cache: PathBuf,
    offline: bool,
    /// The cache is not older than what is wanted: another rank of this machine has just asked.
    pub settled: bool,
    /// Told, at each piece that comes, how far the file is.
    pub moved: &'a dyn Fn(u64),
    /// Attempts, and the pause after the first failure.
    patience: (u32, Duration),
}

/// Files of a repository that are here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// The folder of the commit: its files lie in it as in the repository.
    pub dir: PathBuf,
    /// The commit.
    pub commit: String,
    /// The files that were wanted.
    pub files: Vec<PathBuf>,
    /// Their length together.
    pub bytes: u64,
}

/// A repository at a commit: what it has, and whether the hub can be asked for what is missing.
struct Snapshot<'h> {
    hub: &'h Hub<'h>,
    repo: &'h Repo,
    store: &'h Store,
    listing: Listing,
    /// Why nobody is asked.
    cut_off: Option<String>,
}

/// Which files of a snapshot are wanted.
type Choice<'c> = &'c dyn Fn(&Snapshot) -> Result<Vec<String>>;

fn var(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.trim().is_empty())
}

fn is_on(name: &str) -> bool {
    var(name).is_some_and(|v| ["1", "ON", "YES", "TRUE"].contains(&v.trim().to_ascii_uppercase().as_str()))
}

/// So many seconds, or more where a variable of Python's tools asks for more patience.
fn at_least(name: &str, seconds: u64) -> Duration {
    let asked = var(name).and_then(|v| v.trim().parse().ok()).unwrap_or(0);
    Duration::from_secs(seconds.max(asked).min(24 * 3600))
}

/// A folder of a variable; `~` is the user's.
fn folder(name: &str) -> Option<PathBuf> {
    let text = var(name)?;
    match (text.strip_prefix("~/"), var("HOME")) {
        (Some(rest), Some(home)) => Some(Path::new(&home).join(rest)),
        _ => Some(text.into()),
    }
}

/// `HF_HOME`, else `huggingface` in the user's folder of caches.
fn home() -> Result<PathBuf> {
    let caches = || folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
    folder("HF_HOME")
        .or_else(|| Some(caches()?.join("huggingface")))
        .ok_or_else(|| Error::usage("no folder for downloads: neither HF_HOME, XDG_CACHE_HOME nor HOME is set"))
}

/// The user's token: `HF_TOKEN`, else the file that `hf auth login` writes.
pub(crate) fn token() -> Option<String> {
    let of_file = || {
        let path = folder("HF_TOKEN_PATH").or_else(|| Some(home().ok()?.join("token")))?;
        std::fs::read_to_string(path).ok()
    };
    let text = var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")).or_else(of_file)?;
    // A header holds no line ends; a token has none inside, and no quotes of a shell around it.
    let token = text.trim().trim_matches(['"', '\'']).trim().to_string();
    if !token.bytes().all(|b| b.is_ascii_graphic()) {
        say::warning("the token of the hub has spaces or signs that none has, and is not sent; look at HF_TOKEN");
        return None;
    }
    Some(token).filter(|t| !t.is_empty())
}

/// Whether nobody is to be asked.
pub(crate) fn is_offline() -> bool {
    is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE")
}

/// The address of the hub.
pub(crate) fn endpoint() -> String {
    var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()).trim().trim_end_matches('/').to_string()
}

impl Hub<'_> {
    /// What the environment says, by the names that Python's huggingface_hub reads: `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HOME`,
    /// `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_HUB_ETAG_TIMEOUT`, `HF_HUB_DOWNLOAD_TIMEOUT`.
    ///
    /// # Errors
    /// If no variable says where the cache is.
    pub fn from_env() -> Result<Self> {
        let cache = match folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE")) {
            Some(cache) => cache,
            None => home()?.join("hub"),
        };
        let cache = std::path::absolute(&cache).at(&cache)?;
        Ok(Self {
            client: Client::new(
                &endpoint(),
                token(),
                at_least("HF_HUB_ETAG_TIMEOUT", 10),
                at_least("HF_HUB_DOWNLOAD_TIMEOUT", 60),
            ),
            cache,
            offline: is_offline(),
            settled: false,
            moved: &|_| {},
            patience: (6, Duration::from_millis(500)),
        })
    }

    /// The files of a model.
    ///
    /// # Errors
    /// If the repository, its revision or a file is not there or not for this user; if the hub cannot be reached and the cache lacks
    /// something; if a file cannot be written.
    pub fn model(&self, repo: &Repo, part: Part) -> Result<Fetched> {
        self.fetch(repo, &|snapshot| {
            let index = match part == Part::Whole && snapshot.has(INDEX) {
                true => Some(read_text(&snapshot.get_one(INDEX)?, LONGEST_TEXT)?),
                false => None,
            };
            wanted::files(repo, &snapshot.listing, part, index.as_deref())
        })
    }

    /// The files of a split of a data set.
    ///
    /// # Errors
    /// As [`Hub::model`]; a usage error where the name does not say which configuration or split, with a list of what there is.
    pub fn data(&self, name: &DataName) -> Result<Fetched> {
        self.fetch(&name.repo, &|snapshot| {
            let card = if snapshot.has("README.md") {
                Some(read_text(&snapshot.get_one("README.md")?, LONGEST_TEXT)?)
            } else {
                None
            };
            let files: Vec<&str> = snapshot.listing.entries.iter().map(|e| e.path.as_str()).collect();
            let chosen = dataset::choose(name, &files, card.as_deref())?;
            snapshot.all_pieces(&chosen)?;
            Ok(chosen)
        })
    }

    /// The files of a repository that one of `patterns` fits, as a shell's patterns do.
    ///
    /// # Errors
    /// As [`Hub::model`]; a usage error for a pattern that is none or fits nothing.
    pub fn matching(&self, repo: &Repo, patterns: &[String]) -> Result<Fetched> {
        let patterns: Vec<glob::Pattern> = patterns
            .iter()
            .map(|p| {
                glob::Pattern::new(p).map_err(|e| Error::usage(format!("--include {p}: no pattern of file names: {e}")))
            })
            .collect::<Result<_>>()?;
        self.fetch(repo, &|snapshot| {
            let fits = |path: &str| patterns.iter().any(|p| p.matches(path));
            let names: Vec<String> =
                snapshot.listing.entries.iter().map(|e| e.path.clone()).filter(|p| fits(p)).collect();
            if names.is_empty() {
                return Err(Error::usage(format!(
                    "{repo}: --include fits no file; {}",
                    wanted::found(&snapshot.listing)
                )));
            }
            Ok(names)
        })
    }

    fn fetch(&self, repo: &Repo, choose: Choice) -> Result<Fetched> {
        let store = Store::of(&self.cache, repo);
        let known = store.commit_of(&repo.revision);
        let snapshot = |listing, cut_off| Snapshot { hub: self, repo, store: &store, listing, cut_off };
        let cached = || store.listing(known.as_deref()?);
        if self.offline {
            let why = "HF_HUB_OFFLINE is set".to_string();
            return match cached() {
                Some(listing) => snapshot(listing, Some(why)).take(choose),
                None => Err(self.not_here(repo, &why, "")),
            };
        }
        // A commit never changes; and what another rank has looked up holds for this one.
        if (repo.is_pinned() || self.settled)
            && let Some(listing) = cached()
        {
            let whole = listing.whole;
            let taken = snapshot(listing, (!whole).then(String::new)).take(choose);
            if taken.is_ok() || whole {
                return taken;
            }
        }
        // Where the cache can answer too, nobody waits long.
        let mut asked = self.ask(repo, if known.is_some() { 1 } else { self.patience.0 });
        let unreachable = |why: &str| format!("{} cannot be reached: {why}", self.client.endpoint());
        if let Err(Failure::Retry(why, _) | Failure::Unreachable(why)) = &asked
            && let Some(listing) = cached()
        {
            let (why, commit) = (unreachable(why), listing.commit.clone());
            let taken = snapshot(listing, Some(why.clone())).take(choose);
            if taken.is_ok() {
                self.say_cached(repo, &commit, &why);
                return taken;
            }
            if matches!(asked, Err(Failure::Retry(..))) {
                asked = self.ask(repo, self.patience.0);
            }
        }
        match asked {
            Ok(listing) => {
                let (found, pinned) = (&listing.commit, is_commit(&repo.revision));
                ensure!(!pinned || *found == repo.revision, "{repo}: the hub answered with commit {found}");
                create_dir_all(&store.dir()).context(|| "the cache of the hub's files".to_string())?;
                store.remember(&repo.revision, &listing);
                snapshot(listing, None).take(choose)
            }
            Err(Failure::Fatal(e)) => Err(e.context(repo.to_string())),
            Err(Failure::Refused(r)) => {
                let refused = self.asked(repo, None).refused(&r);
                // Who had access once may have no token today.
                let denied = ["", "GatedRepo"].contains(&r.code.as_str()) && matches!(r.status, 401 | 403);
                match cached().filter(|_| denied) {
                    Some(listing) => {
                        self.say_cached(repo, &listing.commit, &refused.to_string());
                        snapshot(listing, Some(refused.to_string())).take(choose)
                    }
                    None => Err(refused),
                }
            }
            Err(Failure::Retry(why, _) | Failure::Unreachable(why)) => match cached() {
                Some(listing) => snapshot(listing, Some(unreachable(&why))).take(choose),
                None => Err(self.not_here(repo, &unreachable(&why), "")),
            },
        }
    }

    fn say_cached(&self, repo: &Repo, commit: &str, why: &str) {
        let commit = &commit[..commit.len().min(12)];
        say::note(&format!("{why}; {repo} is taken from the cache as it was at commit {commit}"));
    }

    /// What the hub says of a repository.
    fn ask(&self, repo: &Repo, attempts: u32) -> Result<Listing, Failure> {
        let url = repo.api(self.client.endpoint());
        let what = format!("{repo}: asking the hub");
        let ask = || {
            let mut answer = self.client.get(&url, &[])?;
            let text = answer.response.body_mut().with_config().limit(LONGEST_TEXT).read_to_string();
            let text = text.map_err(|e| Failure::Retry(e.to_string(), None))?;
            Listing::from_api(&text).map_err(Failure::Fatal)
        };
        self.client.insist(&what, (attempts.min(4), self.patience.1), || 0, ask)
    }

    fn asked<'a>(&'a self, repo: &'a Repo, file: Option<&'a str>) -> Asked<'a> {
        Asked { repo, file, endpoint: self.client.endpoint(), token: self.client.has_token() }
    }

    /// The one error of who has neither the files nor the hub.
    fn not_here(&self, repo: &Repo, why: &str, missing: &str) -> Error {
        let (cache, flag) = match repo.kind {
            Kind::Model => (self.cache.display(), "--model-path"),
            Kind::Dataset => (self.cache.display(), "--dataset-paths"),
        };
        let what =
            if missing.is_empty() { format!("this {} is not", kind(repo.kind)) } else { format!("{missing} not") };
        Error::new(format!(
            "{repo}: {what} in the cache ({cache}), and {why}; where there is network, run `ringtune download {}` (or `{}`) and copy {} to \
             the cache here (HF_HOME moves it), or give a folder to {flag}",
            repo.typed(),
            repo.typed_hf(),
            repo.folder(),
        ))
    }
}

impl Snapshot<'_> {
    fn has(&self, path: &str) -> bool {
        self.listing.entries.iter().any(|e| e.path == path)
    }

    fn take(&self, choose: Choice) -> Result<Fetched> {
        let names = choose(self)?;
        let files = self.get(&names)?;
        let size = |p: &PathBuf| std::fs::metadata(p).map_or(0, |m| m.len());
        let bytes = files.iter().map(size).sum();
        let commit = self.listing.commit.clone();
        Ok(Fetched { dir: self.store.snapshot(&commit), commit, files, bytes })
    }

    fn get_one(&self, name: &str) -> Result<PathBuf> {
        Ok(self.get(&[name.to_string()])?.remove(0))
    }

    /// Numbered pieces that are here have to be all: a folder of the cache may hold a part of a repository.
    fn all_pieces(&self, names: &[String]) -> Result<()> {
        if self.listing.whole {
            return Ok(());
        }
        for name in names {
            let pieces = name
                .rsplit_once("-of-")
                .and_then(|(front, tail)| Some((front.rsplit_once('-')?.0, tail.get(..5)?.parse::<usize>().ok()?)));
            if let Some((front, n)) = pieces {
                let here = names.iter().filter(|other| other.starts_with(front)).count();
                if here < n {
                    let why = self.cut_off.clone().unwrap_or_default();
                    return Err(self.hub.not_here(
                        self.repo,
                        &why,
                        &format!("{} of {n} pieces of {front} are", n - here),
                    ));
                }
            }
        }
        Ok(())
    }

    /// The files of these names; those that are missing are fetched.
    fn get(&self, names: &[String]) -> Result<Vec<PathBuf>> {
        let entry = |name: &String| {
            self.listing.entries.iter().find(|e| e.path == *name).ok_or_else(|| match &self.cut_off {
                Some(why) => self.hub.not_here(self.repo, why, &format!("{name} is")),
                None => Error::new(format!(
                    "{}: it names {name}, which is not in it; {}",
                    self.repo,
                    wanted::found(&self.listing)
                )),
            })
        };
        let entries: Vec<&Entry> = names.iter().map(entry).collect::<Result<_>>()?;
        let commit = &self.listing.commit;
        let missing: Vec<&&Entry> = entries.iter().filter(|e| self.store.find(commit, e).is_none()).collect();
        if let (Some(why), Some(first)) = (&self.cut_off, missing.first()) {
            let what = match missing.len() {
                1 => format!("{} is", first.path),
                n => format!("{} and {} more are", first.path, n - 1),
            };
            return Err(self.hub.not_here(self.repo, why, &what));
        }
        if !missing.is_empty() {
            self.announce(&missing)?;
        }
        entries.into_iter().map(|e| self.store.find(commit, e).map_or_else(|| self.download(e), Ok)).collect()
    }

    /// Says what will come, and that there is room for it.
    fn announce(&self, missing: &[&&Entry]) -> Result<()> {
        let lacks = |e: &Entry| {
            let size = e.size.unwrap_or(0);
            let Some(etag) = &e.etag else { return size };
            let blob = self.store.blob(etag);
            let part = std::fs::metadata(incomplete(&blob)).map_or(0, |m| m.len());
            if fits(&blob, e.size) { 0 } else { size.saturating_sub(part) }
        };
        let needed: u64 = missing.iter().map(|e| lacks(e)).sum();
        let dir = self.store.dir();
        if let Some(free) = free_space(&dir) {
            ensure!(
                needed <= free,
                "{}: {} are to be fetched, and {} has room for {}; free some space, or name a folder on another disk in HF_HOME",
                self.repo,
                bytes(needed),
                dir.display(),
                bytes(free)
            );
        }
        if needed > 0 {
            say::note(&format!(
                "{}: fetching {}, {}, into {}",
                self.repo,
                plural(missing.len(), "file"),
                bytes(needed),
                dir.display()
            ));
        }
        Ok(())
    }

    /// Fetches a file, unless another process has done it meanwhile.
    fn download(&self, entry: &Entry) -> Result<PathBuf> {
        let (hub, repo, commit) = (self.hub, self.repo, &self.listing.commit);
        let place = || format!("{repo}: {}", entry.path);
        let url = repo.file(hub.client.endpoint(), commit, &entry.path);
        let failed = |failure| match failure {
            Failure::Refused(r) => hub.asked(repo, Some(&entry.path)).refused(&r),
            Failure::Fatal(e) => e.context(place()),
            Failure::Retry(why, _) | Failure::Unreachable(why) => Error::new(format!(
                "{}: {why}; run the command again to go on where it stopped (what came is kept in {})",
                place(),
                self.store.dir().join("blobs").display()
            )),
        };
        // Servers that list names alone say the rest for each file.
        let mut entry = entry.clone();
        if entry.etag.is_none() || entry.size.is_none() {
            let head = hub.client.insist(&place(), hub.patience, || 0, || hub.client.head(&url)).map_err(failed)?;
            entry.sha256 = head.etag.clone().filter(|tag| is_sha256(tag));
            (entry.etag, entry.size) = (entry.etag.or(head.etag), entry.size.or(head.size));
        }
        let is_name = |tag: &String| !tag.is_empty() && tag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        // What has no tag that can name a file is named by its place: that is of one content, since a commit is.
        let place_name =
            || format!("untagged-{}", &blake3::hash(format!("{commit}/{}", entry.path).as_bytes()).to_hex()[..32]);
        let etag = entry.etag.clone().filter(is_name).unwrap_or_else(place_name);
        let blob = self.store.blob(&etag);
        create_dir_all(blob.parent().expect("a blob lies in a folder"))?;
        let lock = self.store.lock(&etag, &format!("{}: waiting for another process that fetches it", place()))?;
        if !fits(&blob, entry.size) && self.store.find(commit, &entry).is_none() {
            let part = if lock.is_held() {
                incomplete(&blob)
            } else {
                incomplete(&blob.with_extension(std::process::id().to_string()))
            };
            let name = entry.path.rsplit('/').next().unwrap_or(&entry.path);
            let checksum = entry.sha256.clone().map(Checksum::Sha256).or_else(|| Checksum::of_tag(&etag));
            let (size, checksum) = (entry.size, checksum.as_ref());
            let transfer = Transfer { url: &url, name, part: &part, tagged: false, size, checksum };
            let attempt = || transfer.attempt(&hub.client, hub.moved);
            hub.client.insist(&place(), hub.patience, || transfer.have(), attempt).map_err(failed)?;
            std::fs::rename(&part, &blob).at(&blob)?;
        }
        self.store.link(commit, &entry, &etag)
    }
}

/// What a blob is called while it comes.
fn incomplete(blob: &Path) -> PathBuf {
    let mut name = blob.as_os_str().to_owned();
    name.push(".incomplete");
    name.into()
}

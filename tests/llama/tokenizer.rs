//! The model's own tokenizer and chat template, from GGUF metadata or the JSON files of a checkpoint.

use super::checkpoint::read_json;
use super::error::{Error, Result};
use super::gguf::Gguf;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{Read, Seek};
use std::path::Path;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer as Inner};

/// `tokenizer.ggml.token_type` of tokens that are matched as a whole in the text and never shown.
const CONTROL: i64 = 3;
/// As [`CONTROL`], but shown.
const USER_DEFINED: i64 = 4;

/// Text to token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    inner: Inner,
    /// Put before every prompt, if the model wants that.
    bos: Option<u32>,
    /// Tokens that end an answer.
    ends: Vec<u32>,
    template: Option<String>,
    bos_text: String,
    eos_text: String,
}

/// One turn of a conversation.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// `system`, `user` or `assistant`.
    pub role: &'a str,
    pub content: &'a str,
}

impl Tokenizer {
    /// Byte-level BPE, as the metadata describe it.
    pub fn from_gguf<R: Read + Seek>(file: &Gguf<R>) -> Result<Self> {
        let model = file.str("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(Error::unsupported("tokenizer.ggml.model", model, "gpt2 (byte-level BPE)"));
        }
        let bytes = ByteLevel::new(false, true, true);
        // What is cut apart before merging; the names are those of llama.cpp.
        let split: PreTokenizerWrapper = match file.str("tokenizer.ggml.pre")? {
            "smollm" => Sequence::new(vec![Digits::new(true).into(), bytes.into()]).into(),
            "gpt-2" | "gpt2" => bytes.into(),
            other => return Err(Error::unsupported("tokenizer.ggml.pre", other, "smollm, gpt-2")),
        };
        let tokens = file.strs("tokenizer.ggml.tokens")?;
        let types = file.ints("tokenizer.ggml.token_type")?;
        if tokens.is_empty() || types.len() != tokens.len() {
            return Err(Error::damaged(
                "GGUF file",
                format!("it has {} tokens and {} token types", tokens.len(), types.len()),
            ));
        }
        let merges = file
            .strs("tokenizer.ggml.merges")?
            .iter()
            .map(|pair| match pair.split_once(' ') {
                Some((a, b)) => Ok((a.to_string(), b.to_string())),
                None => Err(Error::damaged("GGUF file", format!("merge {pair:?} is not two tokens"))),
            })
            .collect::<Result<Vec<_>>>()?;
        let vocab: Vocab = tokens.iter().cloned().zip(0..).collect();
        if vocab.len() != tokens.len() {
            return Err(Error::damaged("GGUF file", "a token occurs twice in the vocabulary"));
        }
        let refused = |e: tokenizers::Error| Error::damaged("tokenizer", e);
        let bpe = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(refused)?;
        let mut inner = Inner::new(bpe);
        inner.with_pre_tokenizer(Some(split)).with_decoder(Some(bytes));
        let of_type = |kind| tokens.iter().zip(types).filter(move |(_, t)| **t == kind).map(|(text, _)| text);
        inner
            .add_special_tokens(
                of_type(CONTROL).map(|t| AddedToken::from(t.clone(), true)).collect::<Vec<_>>(),
            )
            .map_err(refused)?;
        inner
            .add_tokens(of_type(USER_DEFINED).map(|t| AddedToken::from(t.clone(), false)).collect::<Vec<_>>())
            .map_err(refused)?;

        let last = tokens.len() - 1;
        let eos = file.required_int("tokenizer.ggml.eos_token_id", 0, last)?;
        let bos = file.int("tokenizer.ggml.bos_token_id", 0, last)?;
        let add_bos = file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(false);
        let template = "tokenizer.chat_template";
        Ok(Self {
            inner,
            bos: bos.filter(|_| add_bos).map(|id| id as u32),
            ends: vec![eos as u32],
            template: file.get(template).map(|_| file.str(template).map(str::to_string)).transpose()?,
            bos_text: bos.map(|id| tokens[id].clone()).unwrap_or_default(),
            eos_text: tokens[eos].clone(),
        })
    }

    /// From `tokenizer.json`, `tokenizer_config.json` and, where there is one, `generation_config.json` of a folder.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let inner = Inner::from_file(&path).map_err(|e| Error::damaged(path.display(), e))?;
        let settings_path = folder.join("tokenizer_config.json");
        let settings = read_json(&settings_path)?;
        let refused = |reason: String| Error::damaged(settings_path.display(), reason);
        let text_of = |key: &str| {
            let value = settings.get(key).filter(|value| !value.is_null());
            value.map(|v| v.get("content").unwrap_or(v).as_str().unwrap_or_default().to_string())
        };
        let id_of = |key: &str, text: &str| {
            inner.token_to_id(text).ok_or_else(|| refused(format!("{key} {text:?} is not in the vocabulary")))
        };
        let eos_text = text_of("eos_token").ok_or_else(|| refused("eos_token is missing".into()))?;
        let mut ends = vec![id_of("eos_token", &eos_text)?];
        let generation = folder.join("generation_config.json");
        if generation.is_file() {
            // A chat model's turn ends with another token than its texts: either one is a number or all are a list.
            let found = read_json(&generation)?.get("eos_token_id").cloned().unwrap_or_default();
            let ids = found.as_array().cloned().unwrap_or_else(|| vec![found]);
            ends.extend(ids.iter().filter_map(Value::as_u64).map(|id| id as u32));
        }
        // What the tokenizer puts around a text: a beginning, or nothing.
        let around = inner.encode_fast("", true).map_err(|e| Error::damaged(path.display(), e))?;
        let bos = match around.get_ids() {
            [] => None,
            [bos] => Some(*bos),
            ids => {
                return Err(Error::unsupported(
                    path.display(),
                    format!("adding {ids:?}"),
                    "one token at the start",
                ));
            }
        };
        let jinja = folder.join("chat_template.jinja");
        let template = match jinja.is_file() {
            true => Some(std::fs::read_to_string(&jinja).map_err(|e| Error::io(jinja.display(), e))?),
            false => match settings.get("chat_template") {
                Some(Value::Array(named)) => {
                    let default = named.iter().find(|t| t.get("name").is_some_and(|name| name == "default"));
                    default.and_then(|t| t.get("template")?.as_str()).map(str::to_string)
                }
                template => template.and_then(Value::as_str).map(str::to_string),
            },
        };
        let bos_text = text_of("bos_token").unwrap_or_default();
        Ok(Self { inner, bos, ends, template, bos_text, eos_text })
    }

    /// Ids of a text; special tokens written out in it become their ids. A beginning-of-sequence token comes first
    /// if the model wants one and the text, a rendered chat for example, does not begin with it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| Error::Invalid(format!("cannot tokenize: {e}")))?;
        let ids = encoding.get_ids();
        let missing = self.bos.filter(|bos| ids.first() != Some(bos));
        Ok(missing.iter().chain(ids).copied().collect())
    }

    /// Text of ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| Error::Invalid(format!("cannot decode tokens: {e}")))
    }

    /// The tokens that end an answer.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// Whether [`Tokenizer::chat`] has something to render.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// A conversation as the model was trained to see it, ending where its answer begins.
    pub fn chat(&self, messages: &[Message<'_>]) -> Result<String> {
        let Some(template) = &self.template else {
            return Err(Error::unsupported(
                "chat template",
                "missing in the model file",
                "a model that has one",
            ));
        };
        let messages: Vec<BTreeMap<&str, String>> = messages
            .iter()
            .map(|m| BTreeMap::from([("role", m.role.to_string()), ("content", m.content.to_string())]))
            .collect();
        let refused =
            |e: minijinja::Error| Error::unsupported("chat template", format!("not usable: {e}"), "Jinja2");
        let mut environment = Environment::new();
        // The whitespace rules that published templates are written for.
        let syntax =
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(refused)?;
        environment.set_syntax(syntax);
        // Published templates call methods of Python's strings, and this function to refuse a conversation.
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", |reason: String| -> std::result::Result<(), _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason))
        });
        let context = context! {
            messages => messages,
            add_generation_prompt => true,
            bos_token => self.bos_text.as_str(),
            eos_token => self.eos_text.as_str(),
        };
        environment.render_str(template, context).map_err(refused)
    }
}

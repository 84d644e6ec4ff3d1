//! A server and a follower embedded in one actix-web application: written over HTTP on the server's
//! side, read over HTTP on the follower's.
//!
//! ```text
//! cargo run --example http                                    # then, in another terminal:
//! curl -X PUT  localhost:8080/table/colour -d blue            # the epoch and the revision: E/1
//! curl localhost:8080/follower/colour?at=E/1                  # blue
//! curl -X DELETE localhost:8080/table/colour
//! curl localhost:8080/followers
//! ```
//!
//! A reader who passes the place of his own write reads it, or something newer. In a fleet the two
//! halves of this program are two programs.

use std::time::Duration;

use actix_web::{App, HttpResponse, HttpServer, Responder, error, web};
use tablecast::access::tcp::TcpAccess;
use tablecast::{
    Chain, Client, ClientConfig, Epoch, MemoryStore, Position, Revision, Server, ServerConfig,
    Written,
};

/// How long a reader waits for the place that he names.
const PATIENCE: Duration = Duration::from_secs(5);

fn place(written: Written) -> String {
    written.position().map_or_else(String::new, |at| format!("{}/{}", at.epoch, at.revision))
}

/// The reverse of [`place`]. The chain does not matter to who waits.
fn position(place: &str) -> Option<Position> {
    let (epoch, revision) = place.split_once('/')?;
    let epoch = u128::from_str_radix(epoch, 16).ok()?.to_be_bytes();
    let (epoch, revision) = (Epoch::from_bytes(epoch), Revision(revision.parse().ok()?));
    Some(Position { epoch, revision, chain: Chain::START })
}

async fn put(
    server: web::Data<Server>,
    key: web::Path<String>,
    value: web::Bytes,
) -> actix_web::Result<impl Responder> {
    let written = server.write(key.into_inner(), value).await.map_err(error::ErrorBadRequest)?;
    Ok(place(written))
}

async fn delete(
    server: web::Data<Server>,
    key: web::Path<String>,
) -> actix_web::Result<impl Responder> {
    let written = server.delete(key.into_inner()).await.map_err(error::ErrorBadRequest)?;
    Ok(place(written))
}

async fn followers(server: web::Data<Server>) -> actix_web::Result<impl Responder> {
    let followers = server.followers().await.map_err(error::ErrorServiceUnavailable)?;
    let line = |follower: &tablecast::FollowerStatus| {
        format!("{} {} lag {}\n", follower.name, follower.address, follower.lag)
    };
    Ok(followers.iter().map(line).collect::<String>())
}

#[derive(serde::Deserialize)]
struct AtLeast {
    at: Option<String>,
}

async fn get(
    client: web::Data<Client>,
    key: web::Path<String>,
    query: web::Query<AtLeast>,
) -> actix_web::Result<impl Responder> {
    if let Some(at) = &query.at {
        let at = position(at).ok_or_else(|| error::ErrorBadRequest("at is not EPOCH/REVISION"))?;
        let reached = client.wait_for(at, PATIENCE).await;
        reached.map_err(error::ErrorServiceUnavailable)?;
    }
    // The store is read in this thread: no actor is asked.
    let value = client.reader().get(key.as_bytes()).map_err(error::ErrorInternalServerError)?;
    Ok(value.map_or_else(|| HttpResponse::NotFound().finish(), |v| HttpResponse::Ok().body(v)))
}

#[actix_web::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let http = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());

    let server = Server::start(ServerConfig::default(), MemoryStore::new())?;
    let address = server.listen("127.0.0.1:0")?;
    server.ready().await?;

    let config = ClientConfig { name: "http".to_owned(), ..ClientConfig::default() };
    let access = TcpAccess::new(address.to_string());
    let client = Client::start(config, MemoryStore::new(), access)?;
    client.ready().await?;

    let (ours, theirs) = (web::Data::new(server.clone()), web::Data::new(client.clone()));
    let app = move || {
        App::new()
            .app_data(ours.clone())
            .app_data(theirs.clone())
            .route("/table/{key}", web::put().to(put))
            .route("/table/{key}", web::delete().to(delete))
            .route("/followers", web::get().to(followers))
            .route("/follower/{key}", web::get().to(get))
    };
    let web = HttpServer::new(app).workers(2).bind(&http)?;
    println!("listening on http://{}", web.addrs().first().map_or(http, ToString::to_string));
    // Until SIGINT or SIGTERM. Then in this order: nobody reads, nobody follows, nobody writes.
    web.run().await?;
    client.stop().await;
    server.stop().await;
    Ok(())
}

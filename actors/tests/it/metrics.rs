//! What is told to a recorder of metrics.

use std::time::Duration;

use metrics_exporter_prometheus::PrometheusBuilder;
use tablecast_actors::client;
use tablecast_actors::protocol::MemoryStore;
use tablecast_actors::server::Stop;
use tablecast_actors::{ClientConfig, ServerConfig};

use crate::connection::{follow, serve};

#[actix_rt::test]
async fn nobody_is_connected_to_a_server_that_is_gone_or_ready_behind_its_end() {
    tokio::time::pause();
    let recorder = PrometheusBuilder::new().build_recorder();
    let told = recorder.handle();
    let _here = metrics::set_default_local_recorder(&recorder);
    let (endpoint, access) = serve(ServerConfig::default()).await;
    let client = follow(access, MemoryStore::new(), ClientConfig::default()).await;
    let gauges = ["server_followers", "client_connected", "client_ready"];
    let are = |value| {
        let told = told.render();
        let is = |name| told.lines().any(|line| line == format!("tablecast_{name} {value}"));
        assert!(gauges.into_iter().all(is), "{told}");
    };

    // States are told once a second.
    tokio::time::sleep(Duration::from_secs(2)).await;
    are(1);
    client.send(client::Stop).await.unwrap();
    endpoint.server().send(Stop).await.unwrap();
    are(0);
}

// A port's credentials: plain text or TLS, and its guard in both.
#ifndef TERN_SERVER_RPC_PORT_CREDENTIALS_H_
#define TERN_SERVER_RPC_PORT_CREDENTIALS_H_

#include <memory>

#include "grpcpp/security/server_credentials.h"
#include "server/rpc/port_guard.h"
#include "server/rpc/tls_files.h"

namespace tern::rpc {

// For ServerBuilder::AddListeningPort. Every call asks `guard` first. With `tls` (null: plain text)
// each new connection uses the files as they are then; connections that stand keep what they have.
// Clients must bring a certificate of tls.client_ca if it is set. TLS 1.2 or later.
//
// Built on gRPC's C API, the stable one: grpc::InsecureServerCredentials takes no guard, and the
// C++ wrappers of TLS either cannot change certificates or are experimental and drop a working
// certificate for one that does not fit its key.
std::shared_ptr<grpc::ServerCredentials> MakePortCredentials(std::shared_ptr<PortGuard> guard,
                                                             std::shared_ptr<TlsFiles> tls);

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_PORT_CREDENTIALS_H_

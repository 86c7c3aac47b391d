// Accepts the connections of one port for a gRPC server.
//
// gRPC 1.51 closes a listening socket for good once accept() fails, and accept() fails when the
// process has no descriptor left: as many idle clients as a process may have files are enough to
// make a port deaf until the process is started anew. This one refuses connections while some
// descriptors are left for files, and tries again after any failure.
#ifndef TERN_SERVER_RPC_ACCEPTOR_H_
#define TERN_SERVER_RPC_ACCEPTOR_H_

#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "grpcpp/server_builder.h"

namespace tern::rpc {

struct AcceptorOptions {
  std::string host;  // a name or an address, IPv6 ones with or without brackets
  int port = 0;      // 0 = any free one
  std::shared_ptr<grpc::ServerCredentials> credentials;
  // Connections that would get a descriptor of this number or a higher one are closed at once.
  // Linux gives the lowest that is free, so this bounds how many there are. 0 = all that the
  // process may have but 256, or but a quarter where that is less.
  int max_descriptor = 0;
  // Called on the acceptor's thread for each connection that was refused; may be empty.
  std::function<void()> refused;
};

// Not thread safe. Outlives the server's BuildAndStart; Stop() or destroy it before the server.
class Acceptor {
 public:
  // Listens, and registers with `builder`, which then needs no listening port of its own.
  // UNAVAILABLE if the address cannot be resolved or is taken.
  static absl::StatusOr<std::unique_ptr<Acceptor>> Listen(AcceptorOptions options,
                                                          grpc::ServerBuilder& builder);
  ~Acceptor();
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  int port() const { return port_; }

  // Hands connections over from now on: once, after the server was started.
  void Start();

  // Closes the socket: clients that connect later are refused. Idempotent.
  void Stop();

 private:
  Acceptor() = default;
  void Run();

  AcceptorOptions options_;
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> server_;
  int port_ = 0;
  int socket_ = -1;
  int wake_ = -1;  // an event that ends Run()
  std::thread thread_;
};

// Raises the number of descriptors that the process may have to `wanted`, or as near as the system
// allows; never lowers it. Returns what it is then.
int RaiseDescriptorLimit(int wanted);

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_ACCEPTOR_H_
